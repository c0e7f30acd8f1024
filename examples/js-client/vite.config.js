import { defineConfig } from "vite";

// By number, not as "localhost": Node 18 would try only ::1, where the proxy may not listen.
const falproxy = process.env.FALPROXY_URL ?? "http://127.0.0.1:8080";

const proxy = {
  "/api": { target: falproxy, changeOrigin: true },
  // Without a fal key the proxy runs on its sandbox, whose uploads and pictures live here.
  "/sandbox": { target: falproxy, changeOrigin: true },
};

export default defineConfig({
  base: "./", // dist/ works below any path, above all on the proxy's own origin
  server: { proxy },
  preview: { proxy },
});
