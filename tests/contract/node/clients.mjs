// The requests that the vendor's npm client and the third-party MCP server send, written down
// from what is known of them, with axios. Prints what came back as one JSON object.
//
//   node clients.mjs ORIGIN KEY

import axios from "axios";

const [origin, key] = process.argv.slice(2);

// The npm client: one POST of JSON text to a full model URL, every field always there, no
// responseType. Some of its defaults cannot be switched off.
async function npm(slug, given, headers = {}) {
  const body = {
    prompt: given.prompt,
    negativePrompt: given.negativePrompt || "",
    samples: given.samples || 1,
    style: given.style || "base",
    scheduler: given.scheduler || "UniPC",
    num_inference_steps: given.num_inference_steps || 20,
    guidance_scale: given.guidance_scale || 7.5,
    seed: given.seed || 468685,
    strength: 0.75,
    img_width: 1024,
    img_height: 1024,
    refiner: true,
    high_noise_fraction: 0.8,
    base64: given.base64 ?? false,
  };
  return report(
    axios.post(`${origin}/v1/${slug}`, JSON.stringify(body), {
      headers: {
        "Content-Type": "application/json",
        "x-api-key": key,
        "Access-Control-Allow-Origin": "*",
        ...headers,
      },
    }),
    (answer) => ({
      image: typeof answer.data.image === "string" ? answer.data.image.slice(0, 8) : null,
      images: Array.isArray(answer.data.image) ? answer.data.image.length : 1,
    }),
  );
}

// The MCP server: bytes or JSON by the answer's content type, anything else is an error to it,
// and so is a JSON body with a truthy `error`.
async function mcp(method, path, body) {
  return report(
    axios.request({
      method,
      url: `${origin}/v1${path}`,
      data: body,
      responseType: "arraybuffer",
      headers: {
        "x-api-key": key,
        "Content-Type": "application/json",
        "User-Agent": "@segmind/mcp-server/0.1.0",
      },
      timeout: 120000,
    }),
    (answer) => {
      const kind = answer.headers["content-type"] || "";
      const bytes = Buffer.from(answer.data);
      if (kind.includes("image/")) {
        return {
          kind: "image",
          extension: kind.split("/")[1],
          start: bytes.toString("base64").slice(0, 4),
          credits: parseInt(answer.headers["x-remaining-credits"], 10),
        };
      }
      if (!kind.includes("application/json")) return { kind: "refused by the client" };
      const data = JSON.parse(bytes.toString());
      return data.error ? { kind: "error" } : { kind: "json", data };
    },
  );
}

async function report(promise, read) {
  try {
    const answer = await promise;
    return { status: answer.status, ...read(answer) };
  } catch (error) {
    if (!error.response) return { status: 0, error: String(error) };
    const text = Buffer.isBuffer(error.response.data)
      ? JSON.parse(error.response.data.toString())
      : error.response.data;
    return { status: error.response.status, error: text.error, code: text.code };
  }
}

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
    mcp_unknown: await mcp("POST", "/fooocus", { prompt, steps: 20 }),
    mcp_credits: await mcp("GET", "/credits"),
    mcp_health: await mcp("GET", "/health"),
  }),
);
