//! `cargo lab page`: measures how long the controller's web page takes to load in Chromium, with a large mesh.
//!
//! The page is served by the controller's own code over HTTP. The mesh is made up: `controller/examples/page.rs`.
//! Each view has to fit on the screen of a phone, and the keyboard alone has to reach everything.
//!
//! | file | owns |
//! |---|---|
//! | `chromium.rs` | the browser, and the protocol by which it is driven |
//! | `measure.js` | the expression that measures, in the page |

mod chromium;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use clap::builder::RangedU64ValueParser;
use serde::Serialize;
use serde_json::Value;

use crate::lab::binaries::Binaries;
use crate::lab::interrupt::wait_for;
use crate::lab::output::ProgressOutput;
use crate::lab::report::{Figures, Promises, round};

use chromium::{Chromium, Installed, Screen};

/// Options of the scenario.
#[derive(Debug, Args)]
pub struct Options {
    /// Number of nodes of the mesh
    #[arg(long, default_value_t = 1_000, value_parser = RangedU64ValueParser::<usize>::new().range(20..=10_000))]
    nodes: usize,
    /// Number of times that each view is loaded
    #[arg(long, default_value_t = 5, value_parser = RangedU64ValueParser::<usize>::new().range(1..=100))]
    rounds: usize,
}

/// Results of one run.
#[derive(Debug, Default, Serialize)]
pub struct PageFigures {
    /// Number of nodes of the mesh.
    pub nodes: usize,
    /// Version of the browser, as it prints it.
    pub chromium: String,
    /// Views by name.
    pub views: BTreeMap<&'static str, View>,
    /// Documents that the page reads, by their address.
    pub answers: BTreeMap<&'static str, Answer>,
    /// Number of cells of the matrix of the whole mesh.
    pub matrix_cells: usize,
    /// Width in pixels of each view on the screen of a phone of 390 pixels, by name.
    pub phone_width: BTreeMap<&'static str, u64>,
    /// Texts of the elements that the key Tab reaches first, in order.
    pub tab_stops: Vec<String>,
    /// True if the focus stays where it is while the page reads what is new.
    pub keeps_focus: bool,
    /// Median time of the slowest view, in milliseconds.
    pub load_ms: f64,
    /// Upper bound of `load_ms`.
    pub load_ms_max: f64,
    /// Upper bound of the elements of a view.
    pub elements_max: usize,
    /// Upper bound of `matrix_cells`.
    pub matrix_cells_max: usize,
    /// Upper bound of the size of a document, in bytes.
    pub bytes_max: usize,
    /// Promises that did not hold.
    pub failed: Vec<String>,
}

/// A view that was loaded as the first one of a tab.
#[derive(Debug, Default, Serialize)]
pub struct View {
    /// Median time from the navigation until the view is on the screen, in milliseconds.
    pub load_ms: f64,
    /// Longest time of all rounds, in milliseconds.
    pub slowest_ms: f64,
    /// Largest number of elements of the document.
    pub elements: usize,
}

/// A document that the page reads.
#[derive(Debug, Default, Serialize)]
pub struct Answer {
    /// Size in bytes.
    pub bytes: usize,
    /// Time from the connection until the last byte, in milliseconds.
    pub took_ms: f64,
}

/// Upper bound of [`PageFigures::load_ms`].
const LOAD_MS: f64 = 1_000.0;
/// Upper bound of [`View::elements`]. The matrix has the most: 40 rows of 40 cells, each with a text.
const ELEMENTS: usize = 6_000;
/// Upper bound of [`PageFigures::matrix_cells`].
const MATRIX_CELLS: usize = 1_600;
/// Upper bound of [`Answer::bytes`]: a fixed part, for events and tunnels, and a part for each node.
const BYTES: (usize, usize) = (300_000, 400);
/// Views by name, with the part of the address that selects each.
const VIEWS: [(&str, &str); 7] = [
    ("sites", "#/"),
    ("nodes", "#/nodes"),
    ("nodes_of_site", "#/nodes/dc-east"),
    ("matrix", "#/matrix"),
    ("matrix_of_site", "#/matrix/dc-east"),
    ("node", "#/node/node-0005"),
    ("events", "#/events"),
];
/// Address of the matrix of the whole mesh.
const MATRIX: &str = "/api/matrix";
/// Documents that the views read. `node-0005` is one that other nodes report as down.
const ANSWERS: [&str; 5] =
    ["/api/mesh", MATRIX, "/api/matrix?site=dc-east", "/api/node?name=node-0005", "/api/events"];
/// Screen of a phone.
const PHONE: Screen = Screen { width: 390, height: 844 };
/// Width of the document, also of what one would have to scroll to.
const WIDTH: &str = "document.documentElement.scrollWidth";
/// Elements that the key Tab has to reach first. The next one is the first table, which can be scrolled by keys.
const TAB_STOPS: [&str; 5] = ["Skip to content", "Sites", "Nodes", "Matrix", "Events"];
/// Text of the element that has the focus.
const FOCUSED: &str = "document.activeElement.textContent.trim().slice(0, 30)";
/// Class of the element that has the focus, once the page has read and drawn its view for the second time.
const FOCUSED_LATER: &str = r#"new Promise((resolve) => {
  const reads = () => performance.getEntriesByType("resource")
    .filter((entry) => entry.name.includes("/api/")).length;
  const look = () => reads() > 1
    ? setTimeout(() => resolve(document.activeElement.className), 200)
    : setTimeout(look, 100);
  look();
})"#;
/// Class of the region around a table.
const REGION: &str = "wide";
/// Limit for the page to be served.
const START: Duration = Duration::from_secs(30);
/// Limit for a read from the page's server.
const READ: Duration = Duration::from_secs(20);

/// Runs the scenario and returns its results.
pub fn run(options: &Options) -> anyhow::Result<PageFigures> {
    // A refusal must not come after minutes of building.
    let installed = Installed::find()?;
    let program = Binaries::build_example("towline-controller", "page")?;
    let mut figures = PageFigures {
        nodes: options.nodes,
        chromium: installed.version.clone(),
        load_ms_max: LOAD_MS,
        elements_max: ELEMENTS,
        matrix_cells_max: MATRIX_CELLS,
        bytes_max: BYTES.0 + BYTES.1 * options.nodes,
        ..PageFigures::default()
    };
    let mut promises = Promises::new();
    if let Err(error) = figures.measure(options, &installed, &program) {
        promises.fail(format!("{error:#}"));
    }
    figures.judge(&mut promises);
    figures.failed = promises.into_failed();
    Ok(figures)
}

impl PageFigures {
    /// Serves the page, and loads each document and each view.
    fn measure(
        &mut self,
        options: &Options,
        installed: &Installed,
        program: &Path,
    ) -> anyhow::Result<()> {
        let output = ProgressOutput::new();
        output.step(&format!("serving the page of {} nodes", options.nodes));
        let server = Server::start(program, options.nodes)?;
        for target in ANSWERS {
            let begun = Instant::now();
            let text = get(server.address, target)?;
            let took_ms = millis(begun.elapsed());
            if target == MATRIX {
                self.matrix_cells = cells(&text)?;
            }
            self.answers.insert(target, Answer { bytes: text.len(), took_ms });
        }
        output.step(&format!("loading each view {} times", options.rounds));
        let mut browser = installed.start()?;
        for (name, view) in VIEWS {
            let address = format!("http://{}/{view}", server.address);
            self.views.insert(name, load(&mut browser, &address, options.rounds)?);
        }
        self.load_ms = self.views.values().map(|view| view.load_ms).fold(0.0, f64::max);
        output.step("loading each view as a phone, and pressing keys");
        for (name, view) in VIEWS {
            let address = format!("http://{}/{view}", server.address);
            let (tab, _) = browser.open(&address, Some(PHONE))?;
            let width = browser.evaluate(&tab, WIDTH)?;
            self.phone_width.insert(name, width.as_u64().context("a page without a width")?);
            browser.close(&tab)?;
        }
        self.press_keys(&mut browser, &format!("http://{}/", server.address))
    }

    /// Moves the focus from one element to the next, up to the first table, and waits for the next answer.
    fn press_keys(&mut self, browser: &mut Chromium, address: &str) -> anyhow::Result<()> {
        let (tab, _) = browser.open(address, None)?;
        for _ in TAB_STOPS {
            browser.press_tab(&tab)?;
            let text = browser.evaluate(&tab, FOCUSED)?;
            self.tab_stops.push(text.as_str().unwrap_or_default().to_owned());
        }
        browser.press_tab(&tab)?;
        self.keeps_focus = browser.evaluate(&tab, FOCUSED_LATER)? == REGION;
        browser.close(&tab)
    }

    /// Compares the figures with their bounds.
    fn judge(&self, promises: &mut Promises) {
        for (name, view) in &self.views {
            let View { load_ms, elements, .. } = view;
            promises.hold(*load_ms < self.load_ms_max, || {
                format!("{name}: load_ms below {}: {load_ms}", self.load_ms_max)
            });
            promises.hold(*elements <= self.elements_max, || {
                format!("{name}: at most {} elements: {elements}", self.elements_max)
            });
        }
        for (target, Answer { bytes, .. }) in &self.answers {
            promises.hold(*bytes <= self.bytes_max, || {
                format!("{target}: at most {} bytes: {bytes}", self.bytes_max)
            });
        }
        for (name, width) in &self.phone_width {
            promises.hold(*width <= u64::from(PHONE.width), || {
                format!("{name}: not wider than a phone of {} pixels: {width}", PHONE.width)
            });
        }
        let stops = &self.tab_stops;
        promises.hold(*stops == TAB_STOPS, || format!("Tab reaches {TAB_STOPS:?}: {stops:?}"));
        promises
            .hold(self.keeps_focus, || "the focus stays while the page is refreshed".to_owned());
        let cells = self.matrix_cells;
        promises.hold(cells <= self.matrix_cells_max, || {
            format!("at most {} cells of the matrix: {cells}", self.matrix_cells_max)
        });
    }
}

/// Loads a view several times, each time in a tab of its own.
fn load(browser: &mut Chromium, address: &str, rounds: usize) -> anyhow::Result<View> {
    let (mut times, mut elements) = (Vec::new(), 0_usize);
    for _ in 0..rounds {
        let loaded = browser.load(address)?;
        times.push(loaded.painted_ms);
        elements = elements.max(loaded.elements);
    }
    times.sort_by(f64::total_cmp);
    let at = |index: usize| round(times.get(index).copied().unwrap_or_default());
    Ok(View { load_ms: at(rounds / 2), slowest_ms: at(rounds - 1), elements })
}

/// Program that serves the page. Dropping it ends the process.
struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    /// Starts the program on a free port of the loopback, and waits until it answers.
    fn start(program: &Path, nodes: usize) -> anyhow::Result<Self> {
        let address = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
        let child = Command::new(program)
            .args([nodes.to_string(), address.port().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut server = Self { child, address };
        wait_for("answer of the page", START, || {
            if let Some(status) = server.child.try_wait()? {
                bail!("the program that serves the page ended with {status}");
            }
            Ok(get(address, "/").ok())
        })?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only if the process has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the body of a document.
fn get(address: SocketAddr, target: &str) -> anyhow::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(READ))?;
    let request = format!("GET {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("the answer has no body")?;
    let status = head.lines().next().unwrap_or_default();
    ensure!(status.contains(" 200 "), "{target} is answered by: {status}");
    Ok(body.to_owned())
}

/// Returns the number of cells of a matrix.
fn cells(matrix: &str) -> anyhow::Result<usize> {
    let matrix: Value = serde_json::from_str(matrix).context("the matrix is no JSON")?;
    let rows = matrix["cells"].as_array().context("the matrix has no cells")?;
    Ok(rows.iter().filter_map(Value::as_array).map(Vec::len).sum())
}

fn millis(duration: Duration) -> f64 {
    round(duration.as_secs_f64() * 1e3)
}

impl Figures for PageFigures {
    fn failed(&self) -> &[String] {
        &self.failed
    }

    fn for_people(&self) -> String {
        let mut text = format!("{} nodes in {}:\n", self.nodes, self.chromium);
        for (name, View { load_ms, slowest_ms, elements }) in &self.views {
            let _ = writeln!(
                text,
                "  {name:<16}{load_ms:>9.1} ms, slowest {slowest_ms:>9.1} ms, {elements:>6} elements"
            );
        }
        for (target, Answer { bytes, took_ms }) in &self.answers {
            let _ = writeln!(text, "  {target:<26}{bytes:>9} bytes in {took_ms:>7.1} ms");
        }
        let widest = self.phone_width.values().copied().max().unwrap_or_default();
        let _ = write!(
            text,
            "  the matrix has {} cells; on a phone of {} pixels the widest view has {widest}",
            self.matrix_cells, PHONE.width
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_figure_has_its_bound() {
        let view = View { load_ms: 900.0, slowest_ms: 2_000.0, elements: ELEMENTS };
        let mut figures = PageFigures {
            views: BTreeMap::from([("sites", view)]),
            answers: BTreeMap::from([(MATRIX, Answer { bytes: 10, took_ms: 1.0 })]),
            matrix_cells: MATRIX_CELLS,
            phone_width: BTreeMap::from([("sites", u64::from(PHONE.width))]),
            tab_stops: TAB_STOPS.map(ToOwned::to_owned).to_vec(),
            keeps_focus: true,
            load_ms_max: LOAD_MS,
            elements_max: ELEMENTS,
            matrix_cells_max: MATRIX_CELLS,
            bytes_max: 10,
            ..PageFigures::default()
        };
        let failed = |figures: &PageFigures| {
            let mut promises = Promises::new();
            figures.judge(&mut promises);
            promises.into_failed()
        };
        assert!(failed(&figures).is_empty(), "one slow round is no failure");
        figures.matrix_cells = 1_000 * 1_000;
        figures.bytes_max = 9;
        figures.views.insert("nodes", View { load_ms: LOAD_MS, ..View::default() });
        figures.phone_width.insert("matrix", 391);
        figures.tab_stops.remove(0);
        figures.keeps_focus = false;
        let found = failed(&figures);
        assert_eq!(found.len(), 6, "{found:?}");
        assert!(
            found.iter().any(|line| line.starts_with("nodes: load_ms below 1000")),
            "{found:?}"
        );
    }

    #[test]
    fn cells_of_a_matrix_are_counted() {
        assert_eq!(cells(r#"{"cells": [["", "a"], ["b", ""]]}"#).unwrap(), 4);
        assert!(cells("{}").is_err() && cells("text").is_err());
    }
}
