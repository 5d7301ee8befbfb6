#!/bin/sh
# Signs the checksums of a release. KEY is a private SSH key, best one on a security key:
# ssh-keygen -t ed25519-sk -f release-key
set -eu
if [ $# != 2 ]; then
    echo "usage: $0 KEY DIRECTORY" >&2
    exit 2
fi
key=$(realpath "$1")
cd "$2"
sha256sum --check --quiet --strict SHA256SUMS
rm -f SHA256SUMS.sig
ssh-keygen -q -Y sign -f "$key" -n towline-release SHA256SUMS
