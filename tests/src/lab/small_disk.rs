//! A small file system in memory that only the processes of one host see: it can be filled, and made
//! read-only, without any effect on this machine.

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::namespace::Namespace;

/// Size of the file system in bytes.
const SIZE: u32 = 4 << 20;

/// A mounted file system. It ends with the host.
#[derive(Debug)]
pub struct SmallDisk<'a> {
    namespace: &'a Namespace,
    path: PathBuf,
}

impl<'a> SmallDisk<'a> {
    /// Mounts an empty file system at a directory, which must exist, for the processes that are started in
    /// the namespace from now on. The lab itself does not see it.
    pub fn mount(namespace: &'a Namespace, path: &Path) -> anyhow::Result<Self> {
        let at = path.to_owned();
        namespace.call(move || {
            unshare(CloneFlags::CLONE_NEWNS).context("cannot create a mount namespace")?;
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
                .context("cannot make the mounts private")?;
            let options = format!("size={SIZE},mode=0700");
            let options = Some(options.as_str());
            mount(Some("lab"), &at, Some("tmpfs"), MsFlags::empty(), options)
                .with_context(|| format!("cannot mount a file system at {}", at.display()))
        })?;
        Ok(Self { namespace, path: path.to_owned() })
    }

    /// Writes a file until there is no space left.
    pub fn fill(&self) -> anyhow::Result<()> {
        let file = self.path.join("filler");
        self.namespace.call(move || {
            let mut filler = File::create(&file).context("cannot create the filler")?;
            loop {
                match filler.write(&[0x5a; 4096]) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::StorageFull => break,
                    Err(error) => return Err(error).context("cannot write the filler"),
                }
            }
            Ok(fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?)
        })
    }

    /// Makes the file system read-only. No process may have a file open for writing.
    pub fn make_read_only(&self) -> anyhow::Result<()> {
        let at = self.path.clone();
        self.namespace.call(move || {
            let none = None::<&str>;
            mount(none, &at, none, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)
                .with_context(|| format!("cannot make {} read-only", at.display()))
        })
    }
}
