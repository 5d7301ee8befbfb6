//! Files of other programs: the kubelet's credentials and the CNI configuration.
//!
//! They are read directly if that is permitted (root, a pod), and through the helper otherwise.
//! Each request to the helper starts a process. So the helper is only asked for contents, and at
//! most once in each [`HELPER_PERIOD`] whether a file changed.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use towline_helper::client;
use towline_helper::protocol::{Installation, Request};
use zeroize::Zeroizing;

/// Minimum interval between requests to the helper whether files changed. Kubelets replace a
/// certificate long before it expires.
const HELPER_PERIOD: Duration = Duration::from_secs(60);
/// Maximum size of a file, in bytes. Longer files are truncated.
const FILE_BYTES: u64 = 1 << 20;

/// Identity of a file's content: device, inode, time of change in nanoseconds, length.
type Mark = [i128; 4];

/// Identities of a set of files, to detect changes. Kubelets rotate credentials by a new link or
/// file.
#[derive(Debug)]
pub(super) struct Fingerprint {
    /// Each file, with its mark if it exists.
    files: Vec<(PathBuf, Option<Mark>)>,
    /// When the helper was last asked.
    asked: Mutex<Instant>,
}

/// Reads a file of the kubelet.
pub(super) async fn read(path: &Path) -> io::Result<Zeroizing<Vec<u8>>> {
    let path = path.to_owned();
    blocking(move || {
        let file = match File::open(&path) {
            Err(error) if is_denied(&error) => through_helper(&path, &error)?,
            opened => opened?,
        };
        whole(file)
    })
    .await
}

/// Reads the first files of the CNI configuration through the helper.
pub(super) async fn container_network() -> io::Result<Vec<Zeroizing<Vec<u8>>>> {
    blocking(|| {
        let opened = client::ask(Request::ContainerNetwork)?.into_iter().flatten();
        opened.map(|file| whole(file.into())).collect()
    })
    .await
}

/// Returns whether an access failed for lack of permission.
pub(super) fn is_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// Opens a file through the helper. An error names the remedy.
fn through_helper(path: &Path, denied: &io::Error) -> io::Result<File> {
    if Installation::of(path).is_none() {
        let path = path.display();
        let words = format!("{denied}: run `chown root:towline {path}` and `chmod 640 {path}`");
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, words));
    }
    client::kubelet_file(path).map(File::from).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            return error;
        }
        let words = format!(
            "{denied}, and towline-helper cannot open it: {error}: run `systemctl start \
             towline-helper.socket`"
        );
        io::Error::new(io::ErrorKind::PermissionDenied, words)
    })
}

/// Reads at most [`FILE_BYTES`] of a file.
fn whole(file: File) -> io::Result<Zeroizing<Vec<u8>>> {
    let length = file.metadata()?.len().min(FILE_BYTES);
    // The capacity is sufficient from the start, because a growing buffer leaves copies of a key
    // behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1));
    file.take(FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Fingerprint {
    /// Reads the marks of files.
    pub(super) async fn of(paths: Vec<PathBuf>) -> Self {
        let mut files = Vec::new();
        for path in paths {
            let mark = match std::fs::metadata(&path) {
                Ok(metadata) => Some(mark(&metadata)),
                Err(error) if is_denied(&error) => denied_mark(&path).await,
                Err(_) => None,
            };
            files.push((path, mark));
        }
        Self { files, asked: Mutex::new(Instant::now()) }
    }

    /// Returns whether the files have changed.
    pub(super) async fn changed(&self) -> bool {
        let ask = {
            let mut asked = self.asked.lock();
            let due = asked.elapsed() >= HELPER_PERIOD;
            if due {
                *asked = Instant::now();
            }
            due
        };
        for (path, before) in &self.files {
            let now = match std::fs::metadata(path) {
                Ok(metadata) => Some(mark(&metadata)),
                Err(error) if is_denied(&error) && ask => denied_mark(path).await,
                Err(error) if is_denied(&error) => continue,
                Err(_) => None,
            };
            if now != *before {
                return true;
            }
        }
        false
    }
}

/// Returns the mark of a file in a directory that only the helper can access.
async fn denied_mark(path: &Path) -> Option<Mark> {
    let path = path.to_owned();
    let opened = blocking(move || File::from(client::kubelet_file(&path)?).metadata()).await;
    opened.ok().map(|metadata| mark(&metadata))
}

fn mark(metadata: &Metadata) -> Mark {
    let seconds = i128::from(metadata.mtime());
    let time = seconds * 1_000_000_000 + i128::from(metadata.mtime_nsec());
    [metadata.dev().into(), metadata.ino().into(), time, metadata.size().into()]
}

/// Runs the work on a blocking thread, because the helper may take some milliseconds.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}
