// Headless Chromium for tests: nothing but what the job's server sends.
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';

import { chromium } from 'playwright-core';

const FLAGS = [
  '--headless',
  '--no-sandbox',
  '--hide-scrollbars', // as on phones
  '--disable-quic',
  '--no-first-run',
  '--disable-background-networking',
  '--disable-component-update',
  '--disable-sync',
];
const WITHOUT_GPU = ['--disable-gpu'];
const SOFTWARE_GPU = ['--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader'];

/**
 * Open a browser with a profile of its own, and close it after use.
 * @param {{chromium: string, gpu?: boolean, touch?: boolean}} job The program, whether it gets a software GPU,
 *   and whether it is a phone's.
 * @param {(context: import('playwright-core').BrowserContext, failures: string[]) => Promise<void>} use What to
 *   do with it; it is told of requests that failed, and why.
 */
export async function withBrowser(job, use) {
  const profile = fs.mkdtempSync(path.join(os.tmpdir(), 'chromium-'));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: job.chromium,
    headless: false, // the flag says so
    args: [...FLAGS, ...(job.gpu ? SOFTWARE_GPU : WITHOUT_GPU)],
    ignoreDefaultArgs: job.gpu ? ['--disable-gpu'] : [],
    viewport: job.touch ? { width: 390, height: 844 } : { width: 1440, height: 900 },
    hasTouch: job.touch,
    isMobile: job.touch,
  });
  const failures = [];
  context.on('requestfailed', (request) => failures.push(`${request.url()}: ${request.failure().errorText}`));
  try {
    await use(context, failures);
  } catch (error) {
    // The page itself is only told "Failed to fetch".
    throw new Error([error.message, 'requests that failed:', ...failures].join('\n'), { cause: error });
  } finally {
    await context.close();
    fs.rmSync(profile, { recursive: true, force: true });
  }
}

export const readJob = () => JSON.parse(fs.readFileSync(0, 'utf8'));
export const writeResult = (job, result) => fs.writeFileSync(job.output, JSON.stringify(result));
