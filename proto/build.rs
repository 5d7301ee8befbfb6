//! Compiles the schema with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(
        [
            "towline/v1/signed.proto",
            "towline/v1/discovery.proto",
            "towline/v1/admin.proto",
            "towline/v1/local.proto",
        ],
        ["proto"],
    )?;
    let out = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    // A test enumerates the RPCs from the descriptors, so that none can be added without a role.
    std::fs::write(out.join("descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .build_transport(false)
        .bytes(".towline.v1.Signed")
        .bytes(".towline.v1.Changes.changes")
        .compile_fds(descriptors)?;
    Ok(())
}
