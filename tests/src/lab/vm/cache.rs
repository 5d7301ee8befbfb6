//! A cache of what is built once: a directory outside the checkout,
//! `$XDG_CACHE_HOME/towline-lab/vm`, or `~/.cache/towline-lab/vm`. An entry's name ends in the hash
//! of everything that it is made from.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow};
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Whence, lseek64};
use ring::digest::{SHA256, digest};

use crate::lab::output::line;

/// The cache directory.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Time after its last use for which an entry with an outdated hash is kept.
const STALE_AFTER: Duration = Duration::from_secs(14 * 24 * 3600);

impl Cache {
    /// Opens the cache, and creates it if it does not exist.
    pub fn open() -> anyhow::Result<Self> {
        let base = crate::lab::peers::cache_directory().map_err(|error| anyhow!(error))?;
        let root = base.join("vm");
        fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
        Ok(Self { root })
    }

    /// Returns the directory of the entry `kind`-hash. `build` fills it if it does not exist or is
    /// older than `lifetime`. One process builds at a time; an entry is complete or absent.
    pub fn entry(
        &self,
        kind: &str,
        made_from: &[&[u8]],
        lifetime: Option<Duration>,
        build: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<PathBuf> {
        let place = self.root.join(format!("{kind}-{}", hash(made_from)));
        let lock = File::create(self.root.join(format!("{kind}.lock")))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| anyhow!("cannot lock the cache: {errno}"))?;
        let age = |path: &Path| -> Option<Duration> {
            SystemTime::now().duration_since(fs::metadata(path).ok()?.modified().ok()?).ok()
        };
        if place.is_dir() {
            let is_fresh = lifetime.is_none_or(|limit| age(&place).is_some_and(|age| age < limit));
            if is_fresh {
                return Ok(place);
            }
            fs::remove_dir_all(&place)?;
        }
        let scratch = tempfile::Builder::new().prefix("building-").tempdir_in(&self.root)?;
        build(scratch.path())?;
        let scratch = scratch.keep();
        fs::rename(&scratch, &place)
            .with_context(|| format!("cannot move {} into place", scratch.display()))?;
        // `lifetime` counts from the completion.
        File::open(&place)?.set_modified(SystemTime::now())?;
        for path in self.of_kind(kind)? {
            let is_stale = path != place
                && age(&path).is_some_and(|age| age > lifetime.unwrap_or(STALE_AFTER));
            if is_stale {
                line(&format!("removing {}, which is no longer used", path.display()));
                fs::remove_dir_all(&path)?;
            }
        }
        Ok(place)
    }

    /// Removes all entries of a kind, while [`Self::entry`] builds a new one. Files that are linked or
    /// open elsewhere stay usable there.
    pub fn clear(&self, kind: &str) -> anyhow::Result<()> {
        for path in self.of_kind(kind)? {
            fs::remove_dir_all(path)?;
        }
        Ok(())
    }

    /// Returns the paths of all entries of a kind.
    fn of_kind(&self, kind: &str) -> anyhow::Result<Vec<PathBuf>> {
        let prefix = format!("{kind}-");
        let entries = fs::read_dir(&self.root)?.filter_map(Result::ok);
        let named =
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        Ok(named.map(|entry| entry.path()).collect())
    }

    /// Writes the evidence of a failed case and returns its path. It replaces earlier evidence of
    /// that name.
    pub fn store(&self, name: &str, text: &str) -> anyhow::Result<PathBuf> {
        let path = self.root.join(name);
        fs::write(&path, text)?;
        Ok(path)
    }

    /// Returns a directory for one run of machines, which is removed when the returned value is
    /// dropped.
    pub fn scratch(&self) -> anyhow::Result<tempfile::TempDir> {
        Ok(tempfile::Builder::new().prefix("run-").tempdir_in(&self.root)?)
    }
}

/// Returns a short hash of the parts, which also depends on their boundaries.
fn hash(parts: &[&[u8]]) -> String {
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend(digest(&SHA256, part).as_ref());
    }
    data_encoding::HEXLOWER.encode(&digest(&SHA256, &bytes).as_ref()[..8])
}

/// Copies a disk image. Holes stay holes, so that a copy costs only what the image contains.
pub fn copy_sparse(from: &Path, to: &Path) -> anyhow::Result<()> {
    let copy = || -> anyhow::Result<()> {
        let mut source = File::open(from)?;
        let mut target = File::options().create_new(true).write(true).open(to)?;
        let length = source.metadata()?.len();
        target.set_len(length)?;
        let end = i64::try_from(length)?;
        let mut position = 0;
        while position < end {
            let begin = match lseek64(source.as_fd(), position, Whence::SeekData) {
                Ok(begin) => begin,
                // Only a hole remains.
                Err(nix::errno::Errno::ENXIO) => break,
                Err(errno) => return Err(errno.into()),
            };
            position = lseek64(source.as_fd(), begin, Whence::SeekHole)?;
            let begin = u64::try_from(begin)?;
            source.seek(SeekFrom::Start(begin))?;
            target.seek(SeekFrom::Start(begin))?;
            let data = u64::try_from(position)? - begin;
            io::copy(&mut (&source).take(data), &mut &target)?;
        }
        Ok(())
    };
    copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_sparse_copy_has_the_same_bytes_and_the_same_holes() {
        let directory = tempfile::tempdir().unwrap();
        let [from, to] = ["from", "to"].map(|name| directory.path().join(name));
        let mut file = File::create(&from).unwrap();
        file.write_all(b"begin").unwrap();
        file.seek(SeekFrom::Start(8 << 20)).unwrap();
        file.write_all(b"middle").unwrap();
        file.set_len(16 << 20).unwrap();
        copy_sparse(&from, &to).unwrap();
        let read = |path: &Path| {
            let mut bytes = Vec::new();
            File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert!(read(&from) == read(&to));
        // An existing disk is not overwritten.
        copy_sparse(&from, &to).unwrap_err();
    }

    #[test]
    fn the_hash_depends_on_where_parts_end() {
        assert_ne!(hash(&[b"ab", b"c"]), hash(&[b"a", b"bc"]));
        assert_eq!(hash(&[b"ab"]), hash(&[b"ab"]));
    }

    #[test]
    fn an_entry_is_built_once_and_not_at_all_when_its_recipe_fails() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache { root: directory.path().to_owned() };
        cache.entry("disk", &[b"1"], None, |_| anyhow::bail!("no space")).unwrap_err();
        let built = cache
            .entry("disk", &[b"1"], None, |place| Ok(fs::write(place.join("image"), "1")?))
            .unwrap();
        let again = cache
            .entry("disk", &[b"1"], None, |_| anyhow::bail!("the entry exists already"))
            .unwrap();
        assert_eq!(built, again);
        assert!(again.join("image").exists());
        let expired = cache.entry("disk", &[b"1"], Some(Duration::ZERO), |_| Ok(())).unwrap();
        assert!(!expired.join("image").exists());
    }

    #[test]
    fn only_the_entries_of_one_kind_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache { root: directory.path().to_owned() };
        let [old, other] =
            ["state-6.1", "state-6.12"].map(|kind| cache.entry(kind, &[b"1"], None, |_| Ok(())));
        let new = cache.entry("state-6.1", &[b"2"], None, |_| cache.clear("state-6.1")).unwrap();
        assert!(!old.unwrap().exists());
        assert!(new.exists());
        assert!(other.unwrap().exists());
    }
}
