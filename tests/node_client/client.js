// A client of the planning service in another language: makes a plan with the contract that reflection reports, watches
// and reads it back with the published protos. Prints its observations as one JSON object.
//
//   node client.js ADDRESS PROTO_DIR CLUSTER_FILE
"use strict";

const fs = require("fs");
const path = require("path");
const crypto = require("crypto");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const descriptor = require("protobufjs/ext/descriptor");

const OPTIONS = { keepCase: true, longs: String, enums: String, defaults: true, oneofs: true };
const [address, protoDir, clusterFile] = process.argv.slice(2);
const credentials = grpc.credentials.createInsecure();

const inTime = () => ({ deadline: Date.now() + 20_000 });

function call(client, method, request, options = inTime()) {
  return new Promise((resolve, reject) =>
    client[method](request, new grpc.Metadata(), options, (error, answer) => (error ? reject(error) : resolve(answer))),
  );
}

// One request to server reflection, and its answer.
function ask(reflection, question) {
  return new Promise((resolve, reject) => {
    const stream = reflection.ServerReflectionInfo(inTime());
    stream.on("data", (answer) => {
      stream.end();
      answer.error_response ? reject(new Error(answer.error_response.error_message)) : resolve(answer);
    });
    stream.on("error", reject);
    stream.write(question);
  });
}

// The descriptors of a service and of everything it imports, as the server returns them.
async function reflected(reflection, services) {
  const files = new Map();
  const add = (answer) => {
    for (const bytes of answer.file_descriptor_response.file_descriptor_proto) {
      const file = descriptor.FileDescriptorProto.decode(bytes);
      files.set(file.name, file);
    }
  };
  for (const service of services) add(await ask(reflection, { file_containing_symbol: service }));
  for (let missing; (missing = [...files.values()].flatMap((f) => f.dependency).find((name) => !files.has(name))); )
    add(await ask(reflection, { file_by_filename: missing }));
  const set = descriptor.FileDescriptorSet.encode({ file: [...files.values()] }).finish();
  return loader.loadFileDescriptorSetFromBuffer(Buffer.from(set), OPTIONS);
}

function published() {
  const files = ["cluster_service", "plan_service"].map((name) => `hetis/v1/${name}.proto`);
  return loader.loadSync(files, { ...OPTIONS, includeDirs: [protoDir] });
}

const stubs = (definitions, service) => {
  const Client = grpc.makeClientConstructor(definitions[service], service);
  return new Client(address, credentials);
};

function watch(plans, name) {
  return new Promise((resolve, reject) => {
    const seen = [];
    const stream = plans.WatchPlan({ name });
    stream.on("data", (response) => seen.push(response));
    stream.on("error", reject);
    stream.on("end", () => resolve(seen));
  });
}

async function main() {
  const shown = loader.loadSync(path.join(__dirname, "reflection.proto"), OPTIONS);
  const reflection = stubs(shown, "grpc.reflection.v1.ServerReflection");
  const listed = (await ask(reflection, { list_services: "*" })).list_services_response.service.map((s) => s.name);

  const told = await reflected(reflection, ["hetis.v1.ClusterService", "hetis.v1.PlanService"]);
  const clusters = stubs(told, "hetis.v1.ClusterService");
  const makers = stubs(told, "hetis.v1.PlanService");
  const made = await call(clusters, "CreateCluster", {
    cluster_id: "node",
    cluster: { document: { content: fs.readFileSync(clusterFile), source_name: path.basename(clusterFile) } },
    request_id: crypto.randomUUID(),
  });
  const request = {
    plan_id: "node",
    plan: {
      cluster: made.cluster.name,
      spec: {
        model_name: "Llama-2-13B",
        workload_name: "500/100",
        time_limit: { seconds: 60 },
        skip_verification: true, // verification takes longer than everything else
      },
      labels: [{ key: "from", value: "node" }], // protobufjs makes no maps of descriptors
    },
    request_id: crypto.randomUUID(),
  };
  const created = await call(makers, "CreatePlan", request);
  const again = await call(makers, "CreatePlan", request); // the same id gives the same plan, not a second one

  const protos = published();
  const plans = stubs(protos, "hetis.v1.PlanService");
  const seen = await watch(plans, created.plan.name);
  const plan = (await call(plans, "GetPlan", { name: created.plan.name })).plan;
  const missing = await call(plans, "GetPlan", { name: "plans/none" }).catch((error) => error);
  const endless = await call(plans, "GetPlan", { name: created.plan.name }, {}).catch((error) => error);
  const methods = (definitions) => Object.keys(definitions["hetis.v1.PlanService"]).sort();

  console.log(
    JSON.stringify({
      services: listed,
      cluster: { name: made.cluster.name, num_gpus: made.cluster.num_gpus },
      created: { name: created.plan.name, state: created.plan.state },
      again: again.plan.name,
      states: seen.map((response) => response.plan.state),
      sequences: seen.map((response) => response.sequence), // text: they exceed 2^53
      plan: {
        state: plan.state,
        value: plan.result && plan.result.value,
        bound: plan.result && plan.result.bound,
        unit: plan.result && plan.result.unit,
        devices: plan.result && plan.result.replicas.flatMap((r) => r.stages.flatMap((stage) => stage.devices)),
        document_kind: plan.result && JSON.parse(plan.result.document.content.toString()).kind,
        labels: plan.labels,
      },
      missing: { code: missing.code, details: missing.details },
      endless: { code: endless.code },
      same_methods: methods(told).join() === methods(protos).join(),
    }),
  );
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
