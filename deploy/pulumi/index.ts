// A join token for each worker, made by the controller's own command line. Pulumi encrypts what is
// marked as a secret in its state. The machine that runs this holds the administrator's credential
// (/var/lib/towline-controller/admin.*) and reaches TCP 7443: set TOWLINE_CONTROLLER=HOST:PORT here and
// `remote_admin = true` in the controller's configuration. On the controller's own machine neither is needed.
import * as fs from "node:fs";
import * as path from "node:path";
import * as command from "@pulumi/command";
import * as pulumi from "@pulumi/pulumi";

interface Created {
  token: string;
  id: string;
}

const workers = new pulumi.Config().requireObject<string[]>("workers");
const cloudInit = fs.readFileSync(path.join(__dirname, "../cloud-init/worker.yaml"), "utf8");

// Run once for each worker, and never again: a token is single-use.
export const userData = Object.fromEntries(
  workers.map((name) => {
    const made = new command.local.Command(`token-${name}`, {
      create: `towline-controller token create -o json --ttl 24h --name ${name}`,
      delete: "true",
    }, { additionalSecretOutputs: ["stdout"] });
    const token = made.stdout.apply((text) => (JSON.parse(text) as Created).token);
    const text = token.apply((t) => cloudInit.replace("content: TOKEN", `content: ${t}`));
    return [name, pulumi.secret(text)];
  }),
);
