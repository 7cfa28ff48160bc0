// llama.cpp for side_by_side.py: `node llama_cpp.mjs MODEL.gguf THREADS`, one request a line of stdin (its `serve`).
// MOEDGE_NODE_MODULES names the folder in which npm installed node-llama-cpp.
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";
import path from "node:path";

const folder = process.env.MOEDGE_NODE_MODULES ?? ".";
const entry = path.join(folder, "node_modules", "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry).href);
const [, , file, threads] = process.argv;
const llama = await getLlama({gpu: false, build: "never", maxThreads: Number(threads), logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 1024, batchSize: 512, threads: Number(threads)});
const sequence = context.getSequence();

let tokens = null;

async function begin(ids) {
    await tokens?.return();
    await sequence.clearHistory();
    tokens = sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})[Symbol.asyncIterator]();
}

async function turns(steps) {
    const laps = [];
    for (let step = 0; step < steps; step++) {
        const start = performance.now(), cpu = process.cpuUsage();
        await tokens.next();
        const spent = process.cpuUsage(cpu);
        laps.push([performance.now() - start, (spent.user + spent.system) / 1e3]);
    }
    return laps;
}

console.log(JSON.stringify("ready"));
for await (const line of createInterface({input: process.stdin})) {
    const {ids, steps} = JSON.parse(line);
    if (ids) await begin(ids);
    console.log(JSON.stringify(await turns(steps)));
}
process.exit(0);
