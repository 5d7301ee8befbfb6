# One join token for each worker, made by the controller's own command line and kept in encrypted
# state. The machine that runs Terraform holds the administrator's credential, as
# `towline-controller` writes it beside its CA (/var/lib/towline-controller/admin.*), and reaches
# TCP 7443: set TOWLINE_CONTROLLER=HOST:PORT here and `remote_admin = true` in the controller's configuration. On the
# controller's own machine neither is needed.
terraform {
  required_version = ">= 1.7"
  required_providers {
    external = {
      source  = "hashicorp/external"
      version = "~> 2.3"
    }
  }
  # State holds the tokens: keep it where it is encrypted. (OpenTofu can encrypt it itself, with an
  # `encryption` block.)
  backend "s3" {
    key     = "towline/tokens.tfstate"
    encrypt = true
  }
}

variable "workers" {
  description = "Name of each worker, and the pod network that it may announce."
  type        = map(string)
  default = {
    "gpu-1" = "10.244.1.0/24"
    "gpu-2" = "10.244.2.0/24"
  }
}

variable "state_dir" {
  description = "Directory with the administrator's credential."
  type        = string
  default     = "/var/lib/towline-controller"
}

# Every plan asks for a token; those that are not kept below are used by nobody and expire.
data "external" "token" {
  for_each = var.workers
  program = [
    "sh", "-c",
    "towline-controller token create -o json --ttl 24h --name \"$1\" --prefix \"$2\" --state-dir \"$3\" | jq '{token, id}'",
    "token", each.key, each.value, var.state_dir,
  ]
}

# Kept from the first apply on: a machine's token does not change under it. Another name or network
# makes another one.
resource "terraform_data" "token" {
  for_each         = var.workers
  triggers_replace = [each.key, each.value]
  input            = sensitive(data.external.token[each.key].result.token)
  lifecycle {
    ignore_changes = [input]
  }
}

output "user_data" {
  description = "cloud-init of each worker."
  sensitive   = true
  value = {
    for name, kept in terraform_data.token :
    name => replace(file("${path.module}/../cloud-init/worker.yaml"), "content: TOKEN", "content: ${kept.output}")
  }
}
