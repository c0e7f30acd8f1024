// fal's own proxy on Express, as its README shows it. `limit` is ours: Express takes 100 kB else.
import * as falProxy from "@fal-ai/server-proxy/express";
import express from "express";

const app = express();
app.use(express.json({ limit: "100mb" }));
app.all(falProxy.route, falProxy.handler);
app.listen(Number(process.env.PORT), "127.0.0.1");
