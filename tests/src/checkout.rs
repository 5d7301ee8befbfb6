//! Files of this checkout, for the tests that read the project's sources and documents.

use std::path::{Path, PathBuf};

/// Directories of the packages that are shipped.
pub const SHIPPED: [&str; 4] = ["agent", "controller", "kubectl", "proto"];

/// Returns the root of the checkout.
///
/// # Panics
///
/// Never: the package is a directory of the checkout.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the package is a folder of the checkout")
}

/// Returns the Rust files in these places, sorted. A place is a directory or a file, relative to the root;
/// one that does not exist has none. Build directories are left out.
///
/// # Panics
///
/// If a directory cannot be read.
pub fn rust_files(places: &[impl AsRef<Path>]) -> Vec<PathBuf> {
    let mut waiting: Vec<PathBuf> = places.iter().map(|place| root().join(place)).collect();
    let mut found = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                let entries = std::fs::read_dir(&path).expect("a readable directory");
                waiting.extend(entries.map(|entry| entry.expect("a directory entry").path()));
            }
        } else if path.is_file() && path.extension().is_some_and(|ending| ending == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}
