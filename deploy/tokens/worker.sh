#!/bin/sh
# Makes what a worker joins with, and undoes it; for Terraform and Pulumi, whose state then has no token.
#
#   worker.sh create NAME POD_NETWORK DIRECTORY
#       creates a token and writes DIRECTORY/NAME.yaml, the worker's cloud-init with the token in it
#   worker.sh destroy NAME DIRECTORY
#       revokes the open tokens of that name, removes the node from the mesh, and deletes the file
#
# Both can be run again. They need jq, and an administrator's credential: see deploy/terraform/main.tf.
set -eu
umask 077

command -v jq >/dev/null || {
    echo "$0: cannot read what the controller answers: there is no jq: install it" >&2
    exit 1
}

# Each answer is assigned, so that a program that fails ends the script. Inside a pipeline it would not.
revoke_open_tokens() {
    tokens=$(towline-controller token list -o json)
    ids=$(printf '%s' "$tokens" |
        jq -r --arg name "$1" '.[] | select(.name == $name and .state == "open") | .id')
    for id in $ids; do
        towline-controller token revoke "$id"
    done
}

case "${1:-} $#" in
'create 4')
    name=$2 network=$3 directory=$4
    mkdir -p "$directory"
    # An earlier token that nobody used must not stay open beside the new one.
    revoke_open_tokens "$name"
    made=$(towline-controller token create -o json --ttl 24h --name "$name" --prefix "$network")
    # Arguments of programs are visible to other users, their environment is not.
    TOKEN=$(printf '%s' "$made" | jq -er .token)
    export TOKEN
    awk '
        $1 == "content:" && $2 == "TOKEN" { print substr($0, 1, index($0, "TOKEN") - 1) ENVIRON["TOKEN"]; next }
        { print }
    ' "$(dirname "$0")/../cloud-init/worker.yaml" >"$directory/$name.yaml.new"
    mv "$directory/$name.yaml.new" "$directory/$name.yaml"
    ;;
'destroy 3')
    name=$2 directory=$3
    revoke_open_tokens "$name"
    nodes=$(towline-controller node list -o json)
    is_member=$(printf '%s' "$nodes" | jq --arg name "$name" 'any(.[]; .name == $name)')
    case $is_member in
    true) towline-controller node remove "$name" ;;
    false) ;;
    *)
        echo "$0: cannot remove $name: the controller answered without a list of nodes: run it again" >&2
        exit 1
        ;;
    esac
    rm -f "$directory/$name.yaml"
    ;;
*)
    echo "usage: $0 create NAME POD_NETWORK DIRECTORY | destroy NAME DIRECTORY" >&2
    exit 2
    ;;
esac
