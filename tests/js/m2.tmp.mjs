import { launch } from "./chromium.mjs";
import { writeFileSync } from "node:fs";
const b=await launch();
for (let i=0;i<2;i++){
const ctx=await b.newContext({viewport:{width:1440,height:900},reducedMotion:"reduce"});
const p=await ctx.newPage();
if(i==1) await b.startTracing(p,{path:"/tmp/acct/trace.json",categories:["*","disabled-by-default-v8.compile","disabled-by-default-v8.gc","devtools.timeline","toplevel","v8","blink","cc","disabled-by-default-devtools.timeline"]});
await p.goto(process.argv[2]); await p.locator("html[data-ready]").waitFor();
if(i==1) await b.stopTracing();
await ctx.close();
}
await b.close();
