// Sends what standard input asks for, a list of {client, origin, key, verb, slug, body}, and
// prints what each client could tell of the answer.
//
//   node outcomes.mjs < LIST

import { readFileSync } from "node:fs";
import { mcp, npm } from "./requests.mjs";

const JPEG = "/9j/";

const send = {
  npm: (asked) => npm(asked, asked.slug, { ...asked.body, base64: true }),
  mcp: (asked) =>
    mcp(asked, asked.verb, `/${asked.slug}`, asked.verb === "GET" ? undefined : asked.body),
};

const seen = [];
for (const asked of JSON.parse(readFileSync(0, "utf8"))) {
  const answer = await send[asked.client](asked);
  const picture = (answer.image ?? answer.start ?? "").startsWith(JPEG);
  seen.push({ ...asked, status: answer.status, code: answer.code, text: picture ? "a picture" : answer.error });
}
console.log(JSON.stringify(seen));
