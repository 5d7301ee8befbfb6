//! The thread that talks to etcd. The store's calls block, but gRPC needs a runtime.

use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

use super::errors::EtcdError;

/// A thread with a runtime. It ends on drop.
pub(super) struct EtcdThread {
    runtime: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl EtcdThread {
    /// Starts the thread.
    pub(super) fn start() -> Result<Self, EtcdError> {
        let failed = |error: std::io::Error| EtcdError::Ended(error.to_string());
        let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name("etcd".into());
        let thread = thread.spawn(move || {
            // The sender is only dropped.
            let _ = runtime.block_on(stopped);
        });
        Ok(Self { runtime: handle, stop: Some(stop), thread: Some(thread.map_err(failed)?) })
    }

    /// Runs `work` on the thread and waits for its result. It may be called in a runtime too.
    pub(super) fn wait<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, EtcdError>> + Send + 'static,
    ) -> Result<T, EtcdError> {
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        self.spawn(async move {
            // The receiver waits below.
            let _ = answer.send(work.await);
        });
        answered.recv().unwrap_or_else(|error| Err(EtcdError::Ended(error.to_string())))
    }

    /// Returns the runtime of the thread.
    pub(super) fn handle(&self) -> Handle {
        self.runtime.clone()
    }

    /// Starts `work` on the thread. It is dropped when the thread ends.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        drop(self.runtime.spawn(work));
    }
}

impl Drop for EtcdThread {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}
