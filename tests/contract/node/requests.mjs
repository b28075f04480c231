// The requests that the vendor's npm client and the third-party MCP server send, written down
// from what is known of them, with axios.

import axios from "axios";

// The npm client: one POST of JSON text to a full model URL, every field always there, no
// responseType. Some of its defaults cannot be switched off.
export async function npm({ origin, key }, slug, given, headers = {}) {
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
        "x-api-key": key || undefined,
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
export async function mcp({ origin, key }, method, path, body) {
  return report(
    axios.request({
      method,
      url: `${origin}/v1${path}`,
      data: body,
      responseType: "arraybuffer",
      headers: {
        "x-api-key": key || undefined,
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

// It sends a POST again, up to three times, after answers that may pass; when 429 says for how
// long (Retry-After, seconds), it waits so long.
const PASSING = [408, 429, 500, 502, 503, 504];

export async function mcpAgain(...request) {
  for (let tries = 1; ; tries += 1) {
    const answer = await mcp(...request);
    if (tries > 3 || !PASSING.includes(answer.status)) return { ...answer, tries };
    const seconds = answer.status === 429 ? Number(answer.retryAfter ?? 0.1) : 0.1;
    await new Promise((done) => setTimeout(done, 1000 * seconds));
  }
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
    const after = error.response.headers["retry-after"];
    const again = after === undefined ? {} : { retryAfter: after };
    return { status: error.response.status, error: text.error, code: text.code, ...again };
  }
}
