import { launch, withPage } from "./chromium.mjs";
const url=process.argv[2];
const b=await launch();
const s=await b.newBrowserCDPSession();
const cpu=async()=>{const {processInfo}=await s.send("SystemInfo.getProcessInfo"); const o={}; for(const p of processInfo) o[p.type]=(o[p.type]??0)+p.cpuTime; return o;};
for(let i=0;i<5;i++){
 const a=await cpu();
 const ctx=await b.newContext({viewport:{width:1440,height:900},reducedMotion:"reduce"});
 const p=await ctx.newPage();
 const c0=await cpu();
 const c=await ctx.newCDPSession(p); await c.send("Performance.enable");
 let n=0; p.on("request",()=>n++);
 await p.goto(url); await p.locator("html[data-ready]").waitFor();
 const m=Object.fromEntries((await c.send("Performance.getMetrics")).metrics.map(x=>[x.name,x.value]));
 const c1=await cpu();
 await new Promise(r=>setTimeout(r,1500));
 const c2=await cpu();
 const d=(x,y)=>Object.fromEntries(Object.keys(y).map(k=>[k,Math.round((y[k]-(x[k]??0))*1000)]));
 console.log("new page",d(a,c0),"goto",d(c0,c1),"after",d(c1,c2),n,{Script:m.ScriptDuration,Task:m.TaskDuration,Layout:m.LayoutDuration,Style:m.RecalcStyleDuration,V8:m.V8CompileDuration,Proc:m.ProcessTime});
 await ctx.close();
}
await b.close();
