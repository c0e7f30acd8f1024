import { axeViolations } from "./axe.mjs";
import { launch, withPage } from "./chromium.mjs";
const [base, key, name, query=""] = process.argv.slice(2);
const browser = await launch();
try {
  await withPage(browser, {viewport:{width:1440,height:900}}, async (page) => {
    page.on("console", (m)=>{ if(m.type()==="error") console.log("console", m.text()); });
    page.on("response", (r)=>{ if(r.url().includes("/api/")) console.log(r.status(), r.url().replace(base,""), r.headers()["server-timing"]||""); });
    await page.goto(`${base}/dashboard${query}`);
    if (key !== "-") { await page.getByLabel("Your key").fill(key); await page.getByRole("button",{name:"Continue"}).click(); }
    await page.locator("html[data-range]").waitFor({state:"attached"});
    await page.waitForLoadState("networkidle");
    await page.waitForTimeout(500);
    const first = page.locator(".toggle").first();
    if (await first.count()) await first.click();
    for (const colorScheme of ["light","dark"]) {
      await page.emulateMedia({colorScheme, reducedMotion:"reduce"});
      for (const width of [1440,768,360]) {
        await page.setViewportSize({width,height:900});
        await page.waitForTimeout(300);
        const over = await page.evaluate(()=>document.documentElement.scrollWidth-document.documentElement.clientWidth);
        if(over>0) console.log("overflow",width,over);
        await page.screenshot({path:`/tmp/g2/${name}-${width}-${colorScheme}.png`,fullPage:true});
        console.log(colorScheme,width,await axeViolations(page));
      }
    }
  });
} finally { await browser.close(); }
