import { launch, withPage } from "./chromium.mjs";
const [base, key] = process.argv.slice(2);
const browser = await launch();
try { await withPage(browser, {viewport:{width:1440,height:900}}, async (page) => {
  await page.goto(`${base}/dashboard?range=custom&since=${new Date(Date.now()-4*3600e3).toISOString()}&figure=duration`);
  if(key!=="-"){await page.getByLabel("Your key").fill(key); await page.getByRole("button",{name:"Continue"}).click();}
  await page.locator("html[data-range]").waitFor({state:"attached"});
  await page.waitForLoadState("networkidle"); await page.waitForTimeout(800);
  await page.screenshot({path:"/tmp/g2/v-duration.png"});
  for (const f of ["Parts","Errors"]) { await page.getByRole("radio",{name:f}).check({force:true}); await page.waitForTimeout(300); await page.screenshot({path:`/tmp/g2/v-${f}.png`, clip:{x:0,y:200,width:1440,height:500}}); }
  await page.getByRole("button",{name:/^Show the calls with/}).first().click(); await page.waitForTimeout(1500);
  await page.locator(".toggle").nth(2).click();
  await page.screenshot({path:"/tmp/g2/v-list.png"});
  console.log(page.url());
  await page.setViewportSize({width:360,height:800}); await page.waitForTimeout(400); await page.locator("#calls-panel").scrollIntoViewIfNeeded(); await page.screenshot({path:"/tmp/g2/v-360.png"});
});} finally { await browser.close(); }
