// Opens a report as a person does, and writes down what there is; test_report_page.py judges.
import fs from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

import { readJob, withBrowser, writeResult } from './browser.mjs';

const A4 = 794; // pixels of its width, as browsers count
const job = readJob();
const axe = fs.readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
if (job.screenshots) fs.mkdirSync(job.screenshots, { recursive: true });
const seen = { errors: [], requests: [], visits: [] };

/** Runs in the page: what a person would miss or could not reach. */
function look() {
  const pictures = [...document.querySelectorAll('img')];
  const figures = [...document.querySelectorAll('svg')];
  const ids = [...document.querySelectorAll('[id]')].map((element) => element.id);
  return {
    pictures: pictures.length,
    broken: pictures.filter((picture) => !picture.complete || !picture.naturalWidth).map((picture) => picture.alt),
    figures: figures.map((figure) => figure.querySelector('title')?.textContent ?? ''),
    emptyFigures: figures.filter((figure) => figure.getBoundingClientRect().height < 20).length,
    wide: document.documentElement.scrollWidth - innerWidth,
    twice: ids.filter((id, index) => ids.indexOf(id) !== index),
    unfound: [...document.querySelectorAll('a[href^="#"]')]
      .map((link) => link.getAttribute('href').slice(1))
      .filter((id) => !document.getElementById(id)),
    sections: [...document.querySelectorAll('section')].map((section) => section.id),
    scripts: document.scripts.length,
    handlers: [...document.querySelectorAll('*')].flatMap((element) =>
      [...element.attributes].filter(({ name }) => name.startsWith('on')).map(({ name }) => name),
    ),
    small: [...document.querySelectorAll('svg text')]
      .filter((text) => text.checkVisibility())
      .map((text) => parseFloat(getComputedStyle(text).fontSize) * Math.hypot(text.getScreenCTM().b, text.getScreenCTM().d))
      .filter((size) => size && size < 9).length,
    ground: getComputedStyle(document.body).backgroundColor,
    text: document.body.innerText,
  };
}

async function visit(context) {
  const page = await context.newPage();
  page.on('console', (message) => seen.errors.push(`${message.type()}: ${message.text()}`));
  page.on('pageerror', (error) => seen.errors.push(String(error)));
  page.on('request', (request) => seen.requests.push(request.url()));
  for (const colorScheme of ['light', 'dark']) {
    await page.emulateMedia({ colorScheme, media: 'screen' });
    await page.goto(pathToFileURL(job.page).href);
    const { width } = page.viewportSize();
    const found = await page.evaluate(look);
    if (job.screenshots)
      await page.screenshot({ path: `${job.screenshots}/${width}-${colorScheme}.png`, fullPage: true });
    await page.evaluate(() => document.querySelectorAll('details').forEach((details) => (details.open = true)));
    const opened = await page.evaluate(look);
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run({ resultTypes: ['violations'] }));
    const faults = violations.map(({ id, impact, nodes }) => ({ id, impact, where: nodes[0].html.slice(0, 300) }));
    seen.visits.push({ width, colorScheme, ...found, wideOpened: opened.wide, faults });
  }
  await page.emulateMedia({ media: 'print', colorScheme: 'dark' });
  await page.goto(pathToFileURL(job.page).href);
  const screen = page.viewportSize();
  await page.setViewportSize({ width: A4, height: 1123 });
  const { wide, ground } = await page.evaluate(look);
  seen.print = { wide, ground };
  await page.setViewportSize(screen);
  if (job.screenshots) await page.pdf({ path: `${job.screenshots}/page-${page.viewportSize().width}.pdf`, format: 'A4' });
  await page.close();
}

await withBrowser(job, visit);
await withBrowser({ ...job, touch: true }, visit);
writeResult(job, seen);
