//! Disks in layers. A machine writes to a thin file of its own, above files that many machines read:
//! a copy of a disk costs nothing, and what a case changed is a small file.
//!
//! ```text
//!   disk     qcow2   changes of this machine, in its directory
//!   layer1   qcow2   changes of the join, in the cache
//!   layer0   raw     the image, in the cache
//! ```
//!
//! A qcow2 file names the file below it. The names are relative and the same everywhere, so a file
//! keeps its place in a stack when it is linked into another directory.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

/// The files that form a disk, lowest first: a raw image, then qcow2 files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layers {
    files: Vec<PathBuf>,
}

/// Name of the file that a machine writes.
const TOP: &str = "disk";

impl Layers {
    /// Returns a disk of one layer, a raw image.
    pub fn raw(image: &Path) -> Self {
        Self { files: vec![image.to_owned()] }
    }

    /// Returns this disk with another layer above it. The file was the top of a stack that
    /// [`Self::stack`] built from these layers.
    #[must_use]
    pub fn with(&self, changes: PathBuf) -> Self {
        let mut files = self.files.clone();
        files.push(changes);
        Self { files }
    }

    /// Builds the disk in a directory of the same file system: links the layers, and creates an
    /// empty one above them, whose path is returned. An earlier disk in that directory is replaced.
    pub fn stack(&self, directory: &Path) -> anyhow::Result<PathBuf> {
        let size = fs::metadata(&self.files[0])
            .with_context(|| format!("no disk {}", self.files[0].display()))?
            .len();
        for (index, file) in self.files.iter().enumerate() {
            link(file, &directory.join(layer_name(index)))?;
        }
        let highest = self.files.len() - 1;
        let format = if highest == 0 { "raw" } else { "qcow2" };
        let top = directory.join(TOP);
        fs::write(&top, empty_layer(&layer_name(highest), format, size)?)
            .with_context(|| format!("cannot create {}", top.display()))?;
        Ok(top)
    }
}

/// Links a file to another path of the same file system, and replaces what is there.
pub fn link(from: &Path, to: &Path) -> anyhow::Result<()> {
    if let Err(error) = fs::remove_file(to)
        && error.kind() != ErrorKind::NotFound
    {
        return Err(error.into());
    }
    fs::hard_link(from, to)
        .with_context(|| format!("cannot link {} to {}", from.display(), to.display()))
}

fn layer_name(index: usize) -> String {
    format!("layer{index}")
}

/// Size of a cluster, qcow2's unit of allocation: 64 KiB, its default.
const CLUSTER_BITS: u32 = 16;
const CLUSTER: usize = 1 << CLUSTER_BITS;
/// Bytes of virtual disk that one entry of the first table covers: a cluster full of entries of 8
/// bytes, each for a cluster.
const COVERED: u64 = (CLUSTER as u64) * (CLUSTER as u64 / 8);
/// Size in bytes of the header of version 3, without extensions.
const HEADER_BYTES: u32 = 104;
/// Type of the header extension that names the format of the file below.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Returns a qcow2 file (version 3) without data of its own above the file `backing`. Its clusters
/// are the header, the table of reference counts, the reference counts, and the first table.
fn empty_layer(backing: &str, format: &str, size: u64) -> anyhow::Result<Vec<u8>> {
    let at = |cluster: usize| -> [u8; 8] { ((cluster * CLUSTER) as u64).to_be_bytes() };
    let entries = u32::try_from(size.div_ceil(COVERED))?;
    let mut extensions = Vec::new();
    extensions.extend(BACKING_FORMAT.to_be_bytes());
    extensions.extend(u32::try_from(format.len())?.to_be_bytes());
    extensions.extend(format.as_bytes());
    extensions.resize(extensions.len().next_multiple_of(8), 0);
    // The end of the extensions.
    extensions.extend([0; 8]);
    let name_at = u64::from(HEADER_BYTES) + extensions.len() as u64;

    let mut bytes = b"QFI\xfb".to_vec();
    bytes.extend(3_u32.to_be_bytes());
    bytes.extend(name_at.to_be_bytes());
    bytes.extend(u32::try_from(backing.len())?.to_be_bytes());
    bytes.extend(CLUSTER_BITS.to_be_bytes());
    bytes.extend(size.to_be_bytes());
    // No encryption.
    bytes.extend(0_u32.to_be_bytes());
    bytes.extend(entries.to_be_bytes());
    bytes.extend(at(3));
    bytes.extend(at(1));
    // One cluster of that table; no snapshots; no features.
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend([0; 4 + 8 + 3 * 8]);
    // A reference count has 2^4 bits.
    bytes.extend(4_u32.to_be_bytes());
    bytes.extend(HEADER_BYTES.to_be_bytes());
    bytes.extend(extensions);
    bytes.extend(backing.as_bytes());
    ensure!(bytes.len() <= CLUSTER, "the name of the file below is too long");

    bytes.resize(CLUSTER, 0);
    bytes.extend(at(2));
    bytes.resize(2 * CLUSTER, 0);
    // Each of the four clusters is in use once.
    bytes.extend([0, 1].repeat(4));
    bytes.resize(4 * CLUSTER, 0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
    }

    #[test]
    fn an_empty_layer_names_what_is_below_it() {
        let size = 1 << 30;
        let bytes = empty_layer("layer1", "qcow2", size).unwrap();
        assert_eq!(bytes.len(), 4 * CLUSTER);
        assert_eq!(number(&bytes[24..32]), size);
        // 1 GiB is twice what one entry covers.
        assert_eq!(number(&bytes[36..40]), 2);
        let name_at = usize::try_from(number(&bytes[8..16])).unwrap();
        let length = usize::try_from(number(&bytes[16..20])).unwrap();
        assert_eq!(&bytes[name_at..name_at + length], b"layer1");
        assert_eq!(number(&bytes[96..100]), 4);
        assert_eq!(number(&bytes[100..104]), u64::from(HEADER_BYTES));
        assert_eq!(&bytes[112..117], b"qcow2");
        // Each table is at the start of a cluster of the file, and each cluster is counted.
        for field in [40..48, 48..56] {
            let offset = usize::try_from(number(&bytes[field])).unwrap();
            assert!(offset < bytes.len() && offset.is_multiple_of(CLUSTER));
        }
        assert_eq!(bytes[2 * CLUSTER..2 * CLUSTER + 8], [0, 1, 0, 1, 0, 1, 0, 1]);
    }

    #[test]
    fn a_disk_keeps_its_layers_when_it_becomes_one() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("image"), vec![0; 4096]).unwrap();
        for name in ["first", "second"] {
            fs::create_dir(at(name)).unwrap();
        }
        let image = Layers::raw(&at("image"));
        let written = image.stack(&at("first")).unwrap();
        let above = image.with(written.clone());
        above.stack(&at("second")).unwrap();
        assert_eq!(fs::read(at("second/layer1")).unwrap(), fs::read(&written).unwrap());
        assert_eq!(fs::read(at("second/layer0")).unwrap(), fs::read(at("image")).unwrap());
        // A disk that is built again is empty.
        fs::write(at("second/disk"), "changed").unwrap();
        let again = above.stack(&at("second")).unwrap();
        assert_eq!(fs::read(again).unwrap(), empty_layer("layer1", "qcow2", 4096).unwrap());
    }
}
