// llama.cpp for side_by_side.py: `node llama_cpp.mjs MODEL.gguf THREADS`, one turn a line of stdin.
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

async function turn(ids, decode) {
    await sequence.clearHistory();
    const laps = [];
    let start = performance.now(), cpu = process.cpuUsage();
    for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
        const spent = process.cpuUsage(cpu);
        laps.push([performance.now() - start, (spent.user + spent.system) / 1e3]);
        if (laps.length > decode) break;
        start = performance.now();
        cpu = process.cpuUsage();
    }
    return laps;
}

console.log(JSON.stringify("ready"));
for await (const line of createInterface({input: process.stdin})) {
    const {ids, decode} = JSON.parse(line);
    console.log(JSON.stringify(await turn(ids, decode)));
}
process.exit(0);
