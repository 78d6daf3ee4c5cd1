import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.PERSONA_URL ?? "http://127.0.0.1:8000/v1", apiKey: "none" });
const model = (await client.models.list()).data[0].id;
const { data, response } = await client.chat.completions
  .create(
    { model, user: "ana", messages: [{ role: "user", content: "What next?" }] },
    { headers: { "x-persona-instruction": encodeURIComponent("Which music does this user like? ♪") } },
  )
  .withResponse();
console.log(data.choices[0].message.content, response.headers.get("x-persona"));
