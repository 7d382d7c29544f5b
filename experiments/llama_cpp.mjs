// Greedy continuations by llama.cpp: node llama_cpp.mjs MODEL.gguf ADAPTER.gguf|- PROMPTS.json RESULT.json COUNT
import fs from "node:fs";
import {getLlama} from "node-llama-cpp";

const [, , modelPath, adapter, prompts, result, count] = process.argv;
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const lora = adapter === "-" ? {} : {lora: {adapters: [{filePath: adapter, scale: 1}]}};
const found = [];
for (const tokens of JSON.parse(fs.readFileSync(prompts))) {
    const context = await model.createContext({contextSize: 256, threads: 1, flashAttention: false, ...lora});
    const continuation = [];
    // It ends at the end of the text, too.
    for await (const token of context.getSequence().evaluate(tokens, {temperature: 0})) {
        continuation.push(token);
        if (continuation.length >= Number(count)) break;
    }
    found.push(continuation);
    await context.dispose();
}
fs.writeFileSync(result, JSON.stringify(found));
process.exit(0);
