#!/bin/sh
# Verifies a release: the signature of its checksums, then every file of it that is there. SIGNERS names the
# keys that may sign, one a line: release@towline namespaces="towline-release" ssh-ed25519 AAAA...
set -eu
if [ $# != 2 ]; then
    echo "usage: $0 SIGNERS DIRECTORY" >&2
    exit 2
fi
signers=$(realpath "$1")
cd "$2"
ssh-keygen -Y verify -f "$signers" -I release@towline -n towline-release -s SHA256SUMS.sig <SHA256SUMS
sha256sum --check --ignore-missing --strict SHA256SUMS
