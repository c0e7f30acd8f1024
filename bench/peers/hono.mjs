// fal's own proxy on Hono, on Node's server.
import { createRouteHandler } from "@fal-ai/server-proxy/hono";
import { serve } from "@hono/node-server";
import { Hono } from "hono";

const app = new Hono();
app.all("/api/fal/proxy", createRouteHandler());
serve({ fetch: app.fetch, hostname: "127.0.0.1", port: Number(process.env.PORT) });
