# One join token for each worker, made by the controller's own command line. The token is written into
# the worker's cloud-init, in a directory that only this user can read; neither plan nor state has it.
# `terraform destroy`, or taking a worker out of the list, revokes its token and removes its node.
#
# The machine that runs Terraform needs jq. It holds the administrator's credential, as
# `towline-controller` writes it beside its CA (/var/lib/towline-controller/admin.*), and reaches
# TCP 7443: set TOWLINE_CONTROLLER=HOST:PORT here and `remote_admin = true` in the controller's configuration. On the
# controller's own machine neither is needed.
terraform {
  required_version = ">= 1.7"
  # State has names and networks. (OpenTofu can encrypt it itself, with an `encryption` block.)
  backend "s3" {
    key     = "towline/workers.tfstate"
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

variable "directory" {
  description = "Directory for the cloud-init of each worker, on encrypted storage."
  type        = string
  default     = "/var/lib/towline-workers"
}

# Created once: a machine's token does not change under it. Another name, network or directory makes another one, and
# removes the worker's node before. The script is found from this module each time: a checkout may move.
resource "terraform_data" "worker" {
  for_each         = var.workers
  triggers_replace = [each.key, each.value, var.directory]
  input = {
    name      = each.key
    network   = each.value
    directory = var.directory
  }

  provisioner "local-exec" {
    command = "\"$SCRIPT\" create \"$NAME\" \"$NETWORK\" \"$DIRECTORY\""
    environment = {
      SCRIPT    = "${path.module}/../tokens/worker.sh"
      NAME      = self.input.name
      NETWORK   = self.input.network
      DIRECTORY = self.input.directory
    }
  }

  provisioner "local-exec" {
    when    = destroy
    command = "\"$SCRIPT\" destroy \"$NAME\" \"$DIRECTORY\""
    environment = {
      SCRIPT    = "${path.module}/../tokens/worker.sh"
      NAME      = self.input.name
      DIRECTORY = self.input.directory
    }
  }
}

# For a PXE server or the seed image of each machine. What a cloud's own resource gets as user data is in its
# state: write the token to the cloud's secret store there, and let cloud-init read it.
output "user_data_files" {
  description = "File with the cloud-init of each worker."
  value       = { for name, worker in terraform_data.worker : name => "${worker.output.directory}/${name}.yaml" }
}
