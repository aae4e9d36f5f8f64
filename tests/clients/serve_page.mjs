// Uses the page of `serve` as a person does, and writes down what it shows; test_serve_page.py judges.
import fs from 'node:fs';
import { createRequire } from 'node:module';

import { readJob, withBrowser, writeResult } from './browser.mjs';

const job = readJob();
const axe = fs.readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
if (job.screenshots) fs.mkdirSync(job.screenshots, { recursive: true });
const seen = { errors: [], requests: [], posts: [], faults: [], wide: [] };

async function open(context, url) {
  const page = await context.newPage();
  page.setDefaultTimeout(60_000);
  page.on('pageerror', (error) => seen.errors.push(String(error)));
  page.on('console', (message) => {
    // Chromium itself reports every reply of 4xx and 5xx; those that are asked for here are no fault.
    if (!/the server responded with a status of/.test(message.text())) seen.errors.push(message.text());
  });
  page.on('dialog', (dialog) => {
    seen.errors.push(`dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  page.on('request', (request) => {
    seen.requests.push(request.url());
    if (request.method() === 'POST') seen.posts.push(JSON.parse(request.postData()));
  });
  await page.addInitScript(() => {
    document.addEventListener('securitypolicyviolation', ({ violatedDirective, blockedURI }) =>
      console.error(`policy: ${violatedDirective} ${blockedURI}`),
    );
  });
  await page.goto(url);
  return page;
}

/** What everybody can read and reach, in both color schemes. */
async function look(page, name) {
  const { width } = page.viewportSize();
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run({ resultTypes: ['violations'] }));
    seen.faults.push(...violations.map(({ id, nodes }) => `${name} ${width} ${colorScheme} ${id}: ${nodes[0].html.slice(0, 200)}`));
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    if (wide > 0) seen.wide.push(`${name} ${width} ${colorScheme}: ${wide}`);
    if (job.screenshots)
      await page.screenshot({ path: `${job.screenshots}/${name}-${width}-${colorScheme}.png`, fullPage: true });
  }
}

/** Let go a file over the page. */
async function drop(page, path) {
  await page.evaluate((base64) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    transfer.items.add(new File([bytes], 'dropped.jpg', { type: 'image/jpeg' })); // of PNG: the name is wrong
    document.getElementById('drop').dispatchEvent(new DragEvent('drop', { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }, fs.readFileSync(path, 'base64'));
  await page.waitForSelector('#ask:enabled');
}

const idle = (page) => page.waitForSelector('#stop', { state: 'hidden' });
const latest = (page) => page.locator('article').first();

/** Ask by keyboard alone; what the newest article then shows. */
async function ask(page, question) {
  await page.fill('#question', question);
  await page.press('#question', 'Enter');
  await idle(page);
  return latest(page).innerText();
}

const errorOf = async (page) => ((await page.isVisible('#error')) ? page.innerText('#error') : '');

const parts = {
  /** Drop, ask, read while it is written; a second question. */
  async ask(context) {
    const page = await open(context, job.url);
    await look(page, 'empty');
    seen.disabled = await page.isDisabled('#ask');
    seen.modelsOffered = await page.locator('#model option').allInnerTexts();
    seen.modelChoice = await page.isVisible('#model');
    await drop(page, job.image);
    await page.evaluate(() => {
      window.shown = [];
      new MutationObserver(() => {
        const now = document.querySelector('article p')?.textContent;
        if (now && shown.at(-1) !== now) shown.push(now);
      }).observe(document.getElementById('answers'), { subtree: true, childList: true, characterData: true });
    });
    await page.fill('#question', job.questions[0]);
    await page.press('#question', 'Enter');
    seen.focusWhileAnswering = await page.evaluate(() => document.activeElement.id);
    seen.busyWhileAnswering = await page.getAttribute('#answers', 'aria-busy');
    await idle(page);
    seen.busyAfterwards = await page.getAttribute('#answers', 'aria-busy');
    seen.focusAfterwards = await page.evaluate(() => document.activeElement.id);
    seen.shown = await page.evaluate(() => shown);
    seen.facts = await page.locator('article dl').first().innerText();
    for (const question of job.questions.slice(1)) await ask(page, question);
    seen.answers = await page.locator('article p').allInnerTexts();
    seen.articles = await page.locator('article').allInnerTexts();
    seen.elements = await page.locator('article p *').count();
    await look(page, 'answered');
    seen.tree = await page.locator('body').ariaSnapshot();
    if (job.second_model) {
      await page.selectOption('#model', job.second_model);
      seen.otherModel = await ask(page, job.questions[0]);
    }
    await page.close();
  },

  /** Stop in the middle; another picture; files that are no pictures; refusals and broken answers. */
  async troubles(context) {
    const page = await open(context, job.url);
    await drop(page, job.image);
    await page.fill('#question', job.endless);
    await page.press('#question', 'Enter');
    await page.waitForFunction(() => document.querySelector('article p')?.textContent.length > 5);
    await page.click('#stop');
    await idle(page);
    seen.stopped = await latest(page).innerText();
    for (const [name, question] of Object.entries(job.troubles)) {
      const before = await page.locator('article').count();
      await page.fill('#question', question);
      await page.press('#question', 'Enter');
      await idle(page);
      seen[name] = { error: await errorOf(page), added: (await page.locator('article').count()) - before, newest: await latest(page).innerText() };
    }
    await look(page, 'trouble');
    await page.setInputFiles('#file', job.no_image);
    await page.waitForSelector('#error:not([hidden])');
    seen.noImage = await errorOf(page);
    await page.setInputFiles('#file', job.other_format);
    await page.waitForFunction(() => document.querySelectorAll('article').length === 0);
    seen.converted = await page.innerText('#picture-note');
    await ask(page, job.questions[0]);
    seen.convertedError = await errorOf(page);
    await page.close();
  },

  /** A server with a key: it is asked for, a wrong one is refused, the right one is kept for the tab alone. */
  async key(context) {
    const page = await open(context, job.key_url);
    await page.waitForSelector('#key-form:not([hidden])');
    seen.keyFocus = await page.evaluate(() => document.activeElement.id);
    await look(page, 'key');
    await page.keyboard.type('wrong');
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => document.getElementById('key-fault').textContent);
    seen.keyRefused = await page.innerText('#key-fault');
    await page.fill('#key', job.key);
    await page.keyboard.press('Enter');
    await page.waitForSelector('#key-form', { state: 'hidden' });
    await drop(page, job.image);
    seen.keyAnswer = await ask(page, job.questions[0]);
    await page.reload();
    await drop(page, job.image);
    seen.keyAnswerAfterReload = await ask(page, job.questions[0]);
    seen.kept = await page.evaluate(() => [localStorage.length, document.cookie, location.href]);
    await page.evaluate(() => sessionStorage.setItem('fastvlm-api-key', 'expired'));
    await page.fill('#question', job.questions[0]);
    await page.press('#question', 'Enter');
    await page.waitForSelector('#key-form:not([hidden])');
    await page.fill('#key', job.key);
    await page.keyboard.press('Enter');
    await page.waitForSelector('article dl >> nth=1'); // it asked again by itself
    await page.close();
  },
};

await withBrowser(job, async (context) => {
  for (const part of job.parts) await parts[part](context);
});
if (job.parts.includes('ask'))
  await withBrowser({ ...job, touch: true }, async (context) => {
    const page = await open(context, job.url);
    await page.setInputFiles('#file', job.image);
    await page.waitForSelector('#ask:enabled');
    await page.tap('#ask');
    await page.waitForSelector('article dl');
    await look(page, 'phone');
  });
writeResult(job, seen);
