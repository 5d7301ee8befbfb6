//! Chromium without a window. It is driven by its DevTools protocol over a pair of pipes: one JSON message after
//! another, each ended by a zero byte.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::lab::interrupt;
use crate::lab::report::Forbidden;

/// Names under which distributions install it.
const NAMES: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];
/// Arguments of the browser. Its sandbox needs rights that root and containers often lack, and what it loads here
/// is our own page.
const FLAGS: [&str; 11] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-pipe",
];
/// Script of the shell that connects the pipes: the browser reads messages from descriptor 3, and writes them to 4.
const PIPES: &str = r#"exec "$@" 3<&0 4>&1 </dev/null >&2"#;
/// Limit for the answer to a message. A page has 20 s of them.
const LIMIT: Duration = Duration::from_secs(40);
/// Interval at which a wait for an answer checks for Ctrl-C.
const POLL: Duration = Duration::from_millis(100);
/// Expression that measures a page that is being loaded.
const MEASURE: &str = include_str!("measure.js");

/// An installed browser.
#[derive(Debug)]
pub(super) struct Installed {
    program: &'static str,
    /// What it says about its version.
    pub(super) version: String,
}

/// A running browser. Dropping it ends the process.
pub(super) struct Chromium {
    child: Child,
    requests: ChildStdin,
    answers: Receiver<Value>,
    /// Number of messages that were sent. Each has its number as its id.
    sent: u64,
    /// Directory of the profile and of the log.
    directory: TempDir,
}

/// A tab with a page.
pub(super) struct Tab {
    id: String,
    /// Session of the protocol with the tab.
    session: String,
}

/// Size of a screen in pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Screen {
    pub(super) width: u32,
    pub(super) height: u32,
}

/// What a page measured. Times are milliseconds since the beginning of its navigation.
#[derive(Debug, Deserialize)]
pub(super) struct Loaded {
    /// Time at which the view was part of the document. `None` if it never was.
    drawn_ms: Option<f64>,
    /// Time at which the view was on the screen.
    pub(super) painted_ms: f64,
    /// Number of elements of the document.
    pub(super) elements: usize,
    /// Status line of the page.
    status: String,
}

impl Installed {
    /// Looks for the browser.
    ///
    /// # Errors
    /// [`Forbidden`], with the remedy.
    pub(super) fn find() -> Result<Self, Forbidden> {
        for program in NAMES {
            let asked = Command::new(program).arg("--version").stdin(Stdio::null()).output();
            if let Ok(output) = asked
                && output.status.success()
            {
                let version = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                return Ok(Self { program, version });
            }
        }
        Err(Forbidden {
            what: "chromium is missing".to_owned(),
            remedy: "install it with `apt-get install chromium`".to_owned(),
        })
    }

    /// Starts the browser with an empty profile.
    pub(super) fn start(&self) -> anyhow::Result<Chromium> {
        let directory = tempfile::tempdir()?;
        let log = File::create(directory.path().join("log"))?;
        let mut child = Command::new("sh")
            .args(["-c", PIPES, "sh", self.program])
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", directory.path().join("profile").display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", self.program))?;
        let (requests, output) = (child.stdin.take(), child.stdout.take());
        let requests = requests.context("the browser has no input")?;
        let output = output.context("the browser has no output")?;
        let (sender, answers) = channel();
        std::thread::spawn(move || read(output, &sender));
        Ok(Chromium { child, requests, answers, sent: 0, directory })
    }
}

/// Passes on each message of the browser until it ends.
fn read(output: ChildStdout, answers: &Sender<Value>) {
    let mut output = BufReader::new(output);
    loop {
        let mut message = Vec::new();
        if !output.read_until(0, &mut message).is_ok_and(|length| length > 0) {
            return;
        }
        let text = message.strip_suffix(&[0]).unwrap_or(&message);
        let Ok(message) = serde_json::from_slice(text) else { return };
        if answers.send(message).is_err() {
            return;
        }
    }
}

impl Chromium {
    /// Loads an address in a new tab, and returns what was measured.
    pub(super) fn load(&mut self, address: &str) -> anyhow::Result<Loaded> {
        let (tab, loaded) = self.open(address, None)?;
        self.close(&tab)?;
        Ok(loaded)
    }

    /// Opens a tab with this size of the screen, or with the usual one, and loads an address in it.
    pub(super) fn open(
        &mut self,
        address: &str,
        screen: Option<Screen>,
    ) -> anyhow::Result<(Tab, Loaded)> {
        let blank = json!({ "url": "about:blank" });
        let id = text(&self.call(None, "Target.createTarget", blank)?, "targetId")?;
        let attach = json!({ "targetId": id, "flatten": true });
        let session = text(&self.call(None, "Target.attachToTarget", attach)?, "sessionId")?;
        let tab = Tab { id, session };
        let of_tab = Some(tab.session.as_str());
        // A tab in the background draws nothing.
        self.call(of_tab, "Page.bringToFront", json!({}))?;
        if let Some(Screen { width, height }) = screen {
            let phone =
                json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": true });
            self.call(of_tab, "Emulation.setDeviceMetricsOverride", phone)?;
        }
        let navigated = self.call(of_tab, "Page.navigate", json!({ "url": address }))?;
        if let Some(error) = navigated["errorText"].as_str() {
            bail!("cannot load {address}: {error}");
        }
        let measured = self.evaluate(&tab, MEASURE)?;
        let loaded: Loaded = serde_json::from_value(measured)
            .with_context(|| format!("{address} was not measured"))?;
        if loaded.drawn_ms.is_none() {
            bail!("{address} drew no view; its status is: {}", loaded.status);
        }
        Ok((tab, loaded))
    }

    /// Returns the value of an expression in a tab, after waiting if it is a promise.
    pub(super) fn evaluate(&mut self, tab: &Tab, expression: &str) -> anyhow::Result<Value> {
        let wanted =
            json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let result = self.call(Some(&tab.session), "Runtime.evaluate", wanted)?;
        if result["exceptionDetails"].is_object() {
            bail!("the page cannot evaluate an expression: {}", result["exceptionDetails"]);
        }
        Ok(result["result"]["value"].clone())
    }

    /// Presses the key Tab, which moves the focus to the next element.
    pub(super) fn press_tab(&mut self, tab: &Tab) -> anyhow::Result<()> {
        /// Number of the key on every keyboard of Windows, which browsers use.
        const TAB: u32 = 9;
        for kind in ["keyDown", "keyUp"] {
            let key =
                json!({ "type": kind, "key": "Tab", "code": "Tab", "windowsVirtualKeyCode": TAB });
            self.call(Some(&tab.session), "Input.dispatchKeyEvent", key)?;
        }
        Ok(())
    }

    /// Closes a tab.
    pub(super) fn close(&mut self, tab: &Tab) -> anyhow::Result<()> {
        self.call(None, "Target.closeTarget", json!({ "targetId": tab.id })).map(drop)
    }

    /// Sends a message, to a tab if there is a session, and returns the result in its answer.
    fn call(
        &mut self,
        session: Option<&str>,
        method: &str,
        parameters: Value,
    ) -> anyhow::Result<Value> {
        self.sent += 1;
        let mut message = json!({ "id": self.sent, "method": method, "params": parameters });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        if let Err(error) = self.requests.write_all(&bytes).and_then(|()| self.requests.flush()) {
            bail!("the browser takes no {method}: {error}: {}", self.last_words());
        }
        let deadline = Instant::now() + LIMIT;
        loop {
            interrupt::check()?;
            match self.answers.recv_timeout(POLL) {
                Ok(answer) if answer["id"] == self.sent => {
                    if let Some(error) = answer["error"]["message"].as_str() {
                        bail!("the browser refuses {method}: {error}");
                    }
                    return Ok(answer["result"].clone());
                }
                // An event.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the browser ended at {method}: {}", self.last_words())
                }
            }
            if Instant::now() >= deadline {
                bail!("no answer to {method} after {} s: {}", LIMIT.as_secs(), self.last_words());
            }
        }
    }

    /// Returns the end of the browser's log.
    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.trim_end().lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n    ")
    }
}

impl Drop for Chromium {
    fn drop(&mut self) {
        // Fails only if the process has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a text of an answer.
fn text(answer: &Value, key: &str) -> anyhow::Result<String> {
    let text = answer[key].as_str();
    Ok(text.with_context(|| format!("the browser's answer has no {key}: {answer}"))?.to_owned())
}
