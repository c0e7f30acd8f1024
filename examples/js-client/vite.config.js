import { defineConfig } from "vite";

// An IP address instead of "localhost": Node 18 would try only ::1, where the proxy may not listen.
const falproxy = process.env.FALPROXY_URL ?? "http://127.0.0.1:8080";

const proxy = {
  "/api": { target: falproxy, changeOrigin: true },
  // Uploads and images of the sandbox.
  "/sandbox": { target: falproxy, changeOrigin: true },
};

export default defineConfig({
  base: "./", // relative URLs, so that dist/ can be served below any path
  server: { proxy },
  preview: { proxy },
  build: { rollupOptions: { input: ["index.html", "live.html"] } },
});
