#!/bin/sh
# Makes pictures of the controller's web page with a mesh that is made up: docs/screens.sh [DIRECTORY]
# Needs chromium. Look at each picture before you commit it.
set -eu
cd "$(dirname "$0")/.."
out=$(realpath "${1:-docs}")
cargo build -q -p towline-controller --example page
"${CARGO_TARGET_DIR:-target}/debug/examples/page" "${NODES:-24}" &
page=$!
trap 'kill "$page"' EXIT
until curl -s -o /dev/null http://127.0.0.1:7480/; do kill -0 "$page"; sleep 0.1; done
# Chromium refuses to sandbox itself as root. It loads nothing but the page.
flags=
[ "$(id -u)" != 0 ] || flags=--no-sandbox
shot() {
    # shellcheck disable=SC2086
    chromium $flags --headless=new --disable-gpu --hide-scrollbars --virtual-time-budget=3000 \
        --window-size="$2" --screenshot="$out/screen-$1.png" "http://127.0.0.1:7480/$3"
}
shot sites 1280,800 '#/'
shot matrix 1600,900 '#/matrix'
shot node 1280,1200 '#/node/node-0003'
shot events 1280,800 '#/events'
shot phone 390,844 '#/nodes'
