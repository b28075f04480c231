// The npm client and the MCP server at work. Prints what came back as one JSON object.
//
//   node clients.mjs ORIGIN KEY SLOW_KEY

import axios from "axios";
import * as requests from "./requests.mjs";

const [origin, key, slowKey] = process.argv.slice(2);
const npm = (...given) => requests.npm({ origin, key }, ...given);
const mcp = (...given) => requests.mcp({ origin, key }, ...given);

async function preflight(from) {
  const answer = await axios.request({
    method: "OPTIONS",
    url: `${origin}/v1/sdxl1.0-txt2img`,
    validateStatus: () => true,
    headers: {
      Origin: from,
      "Access-Control-Request-Method": "POST",
      "Access-Control-Request-Headers": "access-control-allow-origin,content-type,x-api-key",
    },
  });
  return {
    status: answer.status,
    origin: answer.headers["access-control-allow-origin"] ?? null,
    headers: answer.headers["access-control-allow-headers"] ?? null,
  };
}

// The last request of a key's share, sent again and again until the share is used up; then once
// more, as the MCP server does it.
async function comesBack(slug, body) {
  const slow = { origin, key: slowKey };
  let refused;
  do {
    refused = await requests.mcp(slow, "POST", slug, { prompt: "fail: used up" });
  } while (refused.status === 422);
  return { refused, ...(await requests.mcpAgain(slow, "POST", slug, body)) };
}

const prompt = "a red house by a blue lake";
const sdxl = {
  prompt,
  negative_prompt: "trees",
  img_width: 1024,
  img_height: 1024,
  samples: 1,
  guidance_scale: 7.5,
  num_inference_steps: 25,
  scheduler: "DDIM",
  base64: false,
  seed: 5,
};
const lightning = {
  prompt,
  img_width: 512,
  img_height: 512,
  samples: 1,
  guidance_scale: 2,
  num_inference_steps: 8,
  base64: false,
};

console.log(
  JSON.stringify({
    npm_base64: await npm("sdxl1.0-txt2img", { prompt, negativePrompt: "trees", base64: true }),
    npm_strings: await npm("sdxl1.0-txt2img", { prompt, seed: "468685", base64: true }),
    npm_several: await npm("sdxl1.0-txt2img", { prompt, samples: 2, base64: true }),
    npm_from_a_page: await npm(
      "sdxl1.0-txt2img",
      { prompt, base64: true },
      { Origin: "https://app.example" },
    ),
    npm_unknown: await npm("no-such-model", { prompt }),
    npm_wrong: await npm("sdxl1.0-txt2img", { prompt, scheduler: "Euler z" }),
    npm_failed: await npm("sdxl1.0-txt2img", { prompt: "fail: no luck", base64: true }),
    preflight_page: await preflight("https://app.example"),
    preflight_other: await preflight("https://other.example"),
    mcp_sdxl: await mcp("POST", "/sdxl1.0-txt2img", sdxl),
    mcp_draft: await mcp("POST", "/sdxl1.0-txt2img", { ...sdxl, num_inference_steps: 10 }),
    mcp_small: await mcp("POST", "/sdxl1.0-txt2img", { ...sdxl, img_width: 256, guidance_scale: 20 }),
    mcp_lightning: await mcp("POST", "/sdxl-lightning", lightning),
    mcp_several: [
      await mcp("POST", "/sdxl1.0-txt2img", { ...sdxl, seed: 1 }),
      await mcp("POST", "/sdxl1.0-txt2img", { ...sdxl, seed: 2 }),
    ],
    mcp_again: await comesBack("/sdxl1.0-txt2img", sdxl),
    mcp_unknown: await mcp("POST", "/fooocus", {
      prompt, negative_prompt: "", steps: 20, samples: 1, guidance_scale: 7.5, seed: 7,
      styles: "V2,Enhance", aspect_ratio: "1024*1024", base_model: "juggernaut",
      scheduler: "DPM++ SDE",
    }),
    mcp_credits: await mcp("GET", "/credits"),
    mcp_health: await mcp("GET", "/health"),
  }),
);
