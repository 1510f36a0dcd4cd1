// What the tests by a real browser share.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

export const folder = await mkdtemp(join(tmpdir(), "tw"));
export const target = `unix://${folder}/s`;
const running = new Set();

/** Starts a command that ends with main; its output, and that of the log, are thrown away unless stdio says else. */
export function start(bin, command, args, env = {}, stdio = ["ignore", "ignore", "inherit"]) {
  const child = spawn(join(bin, command), args, { stdio, env: { ...process.env, ...env } });
  running.add(child);
  child.on("exit", () => running.delete(child));
  return child;
}

export async function freePort() {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return port;
}

export const browse = () => chromium.launch({
  executablePath: process.env.CHROMIUM || "/usr/bin/chromium",
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
});

/** Asks again until f returns something, a minute at most. */
export async function until(what, f) {
  for (const end = Date.now() + 60_000; ; await new Promise(r => setTimeout(r, 200))) {
    const found = await f().catch(() => undefined);
    if (found) return found;
    if (Date.now() > end) throw new Error(`no ${what} within a minute`);
  }
}

export async function main(test) {
  try {
    await test();
  } finally {
    for (const child of running) child.kill("SIGKILL");
    await rm(folder, { recursive: true });
  }
}
