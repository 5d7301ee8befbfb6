// A join token for each worker, made by the controller's own command line. The token is written into the worker's
// cloud-init, in a directory that only this user can read; Pulumi's state does not have it. `pulumi destroy`, or
// taking a worker out of the list, revokes its token and removes its node.
//
// The machine that runs this needs jq. It holds the administrator's credential
// (/var/lib/towline-controller/admin.*) and reaches TCP 7443: set TOWLINE_CONTROLLER=HOST:PORT here and
// `remote_admin = true` in the controller's configuration. On the controller's own machine neither is needed.
import * as path from "node:path";
import * as command from "@pulumi/command";
import * as pulumi from "@pulumi/pulumi";

const config = new pulumi.Config();
// Each is NAME=POD_NETWORK.
const workers = config.requireObject<string[]>("workers").map((worker) => {
  const [name = "", network = ""] = worker.split("=");
  return { name, network };
});
const directory = config.get("directory") ?? "/var/lib/towline-workers";
const script = path.resolve(__dirname, "../tokens/worker.sh");

// Run once for each worker. Another name, network or directory makes another token, and removes the worker's node
// before. Without `update`, another path of the script would run `create` again: it revokes the token that the machine
// is about to use.
export const userDataFiles = Object.fromEntries(
  workers.map(({ name, network }) => {
    const made = new command.local.Command(`worker-${name}`, {
      create: '"$SCRIPT" create "$NAME" "$NETWORK" "$DIRECTORY"',
      update: ":",
      delete: '"$SCRIPT" destroy "$NAME" "$DIRECTORY"',
      environment: { SCRIPT: script, NAME: name, NETWORK: network, DIRECTORY: directory },
      triggers: [name, network, directory],
    }, { deleteBeforeReplace: true });
    return [name, made.stdout.apply(() => path.join(directory, `${name}.yaml`))];
  }),
);
