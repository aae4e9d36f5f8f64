// Uses the page of examples/web as a person does, and writes down what it shows; test_page.py judges.
import fs from 'node:fs';

import { readJob, withBrowser, writeResult } from './browser.mjs';

const job = readJob();
const seen = { errors: [], requests: [], faults: [], answers: [] };

const text = (page, selector) => page.locator(selector).innerText();
const ready = (page) =>
  page.waitForFunction(() => !['Starting...'].includes(document.getElementById('status').textContent));
const answered = (page) =>
  page.waitForFunction(
    () => document.querySelector('article small') || !document.getElementById('error').hidden,
  );
const failed = (page) => page.locator('#error').waitFor();

async function open(context) {
  const page = await context.newPage();
  page.setDefaultTimeout(120_000);
  page.on('pageerror', (error) => seen.errors.push(String(error)));
  page.on('request', (request) => seen.requests.push(request.url()));
  await page.goto(job.url);
  return page;
}

async function screenshot(page, name) {
  if (!job.screenshots) return;
  const { width, height } = page.viewportSize();
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    await page.screenshot({ path: `${job.screenshots}/${name}-${width}-${colorScheme}.png`, fullPage: true });
    await page.setViewportSize({ width, height });
  }
}

/** Runs in the page: what is wider than the window, and texts that are hard to read, in the scheme that is set. */
function faults() {
  const channels = (color) => (color.match(/[\d.]+/g) ?? []).map(Number);
  const light = (color) => {
    const [r, g, b] = channels(color).map((c) =>
      c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4,
    );
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  const found = [];
  if (document.documentElement.scrollWidth > innerWidth)
    found.push(`wider than the window: ${document.documentElement.scrollWidth}`);
  for (const element of document.querySelectorAll('body *')) {
    const ownText = [...element.childNodes].some(
      (node) => node.nodeType === Node.TEXT_NODE && node.data.trim(),
    );
    if (!ownText || !element.checkVisibility() || element.disabled || element.tagName === 'OPTION') continue;
    const [a, b] = [getComputedStyle(element).color, behind(element)].map(light);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5)
      found.push(`contrast ${contrast.toFixed(1)}: ${element.textContent.trim().slice(0, 40)}`);
  }
  for (const control of document.querySelectorAll('button, select, textarea, input')) {
    const { width, height } = control.getBoundingClientRect();
    if (control.checkVisibility() && !control.matches('.unseen') && Math.min(width, height) < 24)
      found.push(`small: ${control.id}`);
  }
  return found;
}

/** Ask, and wait for the end of the answer; with screenshots on the way. */
async function ask(page) {
  const slowly = async (route) => {
    await new Promise((done) => setTimeout(done, 6000));
    await route.continue();
  };
  if (job.screenshots) await page.route('**/*.onnx_data', slowly);
  await page.click('#ask');
  if (job.screenshots) {
    await page.waitForTimeout(4000);
    await screenshot(page, 'loading');
    await page.waitForFunction(() => document.querySelector('article p')?.textContent.length > 20);
    await screenshot(page, 'answering');
  }
  await answered(page);
}

async function noteFaults(page) {
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme });
    const found = await page.evaluate(faults);
    seen.faults.push(...found.map((fault) => `${page.viewportSize().width} ${colorScheme}: ${fault}`));
  }
}

const parts = {
  /** The first visit: choose, download, ask, read while it is written. */
  async firstVisit(context) {
    const page = await open(context);
    await ready(page);
    seen.empty = {
      status: await text(page, '#status'),
      ask: await text(page, '#ask'),
      disabled: await page.isDisabled('#ask'),
    };
    seen.tree = await page.locator('body').ariaSnapshot();
    await noteFaults(page);
    await screenshot(page, 'empty');
    await page.setInputFiles('#file', job.image);
    await page.waitForSelector('#ask:enabled');
    await screenshot(page, 'chosen');
    seen.offer = await text(page, '#ask');
    await page.evaluate(() => {
      window.shown = { statuses: [], texts: [], progress: [] };
      new MutationObserver(() => {
        const now = document.getElementById('status').textContent;
        if (now && shown.statuses.at(-1) !== now) shown.statuses.push(now);
        const answer = document.querySelector('article p')?.textContent;
        if (answer && shown.texts.at(-1) !== answer) shown.texts.push(answer);
        const { value, max } = document.getElementById('progress');
        if (value) shown.progress.push([value, max]);
      }).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
    });
    await ask(page);
    seen.shown = await page.evaluate(() => shown);
    seen.answers.push(await text(page, 'article p'));
    seen.note = await text(page, 'article small');
    seen.stored = await text(page, '#stored');
    await noteFaults(page);
    await screenshot(page, 'answered');
    await page.close();
  },

  /** Later: nothing is downloaded again; the keyboard alone; a stop; deleting what is stored. */
  async secondVisit(context) {
    seen.requests.length = 0;
    const page = await open(context);
    await page.locator('#status', { hasText: 'Choose a picture' }).waitFor();
    await page.evaluate(
      async (base64) => {
        const transfer = new DataTransfer();
        const bytes = await (await fetch(`data:;base64,${base64}`)).arrayBuffer();
        transfer.items.add(new File([bytes], 'pasted.png', { type: 'image/png' }));
        document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: transfer }));
      },
      fs.readFileSync(job.image, 'base64'),
    );
    await page.waitForSelector('#ask:enabled');
    await page.keyboard.press('Tab');
    seen.tabs = [];
    for (let i = 0; i < 6; ++i) {
      seen.tabs.push(await page.evaluate(() => document.activeElement.id));
      await page.keyboard.press('Tab');
    }
    await page.focus('#question');
    await page.keyboard.press('Enter');
    await answered(page);
    seen.answers.push(await text(page, 'article p'));
    seen.secondRequests = [...seen.requests];
    await page.click('#ask');
    await page.waitForFunction(() => document.querySelector('article.waiting p')?.textContent.length > 10);
    seen.focusWhileAnswering = await page.evaluate(() => document.activeElement.id);
    await page.click('#stop');
    await page.waitForFunction(() => !document.querySelector('article.waiting'));
    seen.stoppedAnswer = await page.locator('article p').first().innerText();
    seen.stoppedNote = await page.locator('article small').first().innerText();
    await page.click('#delete');
    await page.locator('#delete').waitFor({ state: 'hidden' });
    seen.storedAfterDelete = await page.evaluate(async () => (await caches.keys()).length);
    await page.close();
  },

  /** A phone: the camera is offered, dropping and pasting are not. */
  async phone(context) {
    const page = await open(context);
    await ready(page);
    seen.phoneTexts = (await page.locator('label').allInnerTexts()).map((label) => label.trim());
    await noteFaults(page);
    await screenshot(page, 'empty');
    await page.setInputFiles('#camera', job.high_image);
    await page.waitForSelector('#ask:enabled');
    await screenshot(page, 'chosen');
    await ask(page);
    seen.answers.push(await text(page, 'article p'));
    await noteFaults(page);
    await screenshot(page, 'answered');
  },

  /** What can go wrong. */
  async troubles(context) {
    const page = await open(context);
    await ready(page);
    await page.setInputFiles('#file', job.no_image);
    await failed(page);
    seen.noPicture = await text(page, '#error-text');
    await screenshot(page, 'no-picture');
    await page.setInputFiles('#file', job.image);
    await page.waitForSelector('#ask:enabled');
    await page.route('**/*.onnx_data', (route) => route.abort());
    await page.click('#ask');
    await failed(page);
    seen.noNetwork = await text(page, '#error-text');
    await noteFaults(page);
    await screenshot(page, 'no-network');
    await page.unroute('**/*.onnx_data');
    await page.click('#retry'); // it downloads, and asks what was asked
    await answered(page);
    seen.answers.push(await text(page, 'article p'));
    await page.close();

    const lost = await context.newPage();
    await lost.route('**/config.json', (route) => route.fulfill({ status: 404 }));
    await lost.goto(job.url);
    await lost.evaluate(() => caches.delete('transformers-cache'));
    await lost.reload();
    await failed(lost);
    seen.noModel = await text(lost, '#error-text');
    await lost.close();
  },
};

await withBrowser(job, async (context) => {
  for (const part of job.parts) await parts[part](context);
});
await withBrowser({ ...job, touch: true }, parts.phone);
writeResult(job, seen);
