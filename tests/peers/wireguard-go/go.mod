// What `cargo lab` builds wireguard-go from: the newest version, pinned with its dependencies.
module towline.internal/peers

go 1.23.1

require golang.zx2c4.com/wireguard v0.0.0-20260522210424-ecfc5a8d5446
