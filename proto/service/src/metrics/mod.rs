//! Metrics for Prometheus: the table of a program's metrics, their text, and the server.
//!
//! Metrics are states that the program has already. So nothing is counted twice: each scrape converts one
//! snapshot, and the table says everything else (name, kind, labels, help). Documents and tests read the same
//! table.
//!
//! The text is our own, because the library for this (`prometheus-client`) writes OpenMetrics alone, and keeps
//! metrics in a registry of live values that a snapshot would be copied into. The format is lines with three
//! escapes. The server is that of [`http`](crate::http).

mod server;

use std::fmt::{self, Write as _};

pub use server::{Readiness, serve, serve_with_health};

/// Content type of [`Exposition::text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A number that only grows, until the program starts again. Its name ends in `_total`.
    Counter,
    /// A number that grows and shrinks.
    Gauge,
}

impl Kind {
    /// Returns the word of the text format.
    pub fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// A metric: an entry of a program's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// Name: `towline_<noun>_<unit>`, and `_total` for a counter.
    pub name: &'static str,
    /// Kind of the metric.
    pub kind: Kind,
    /// Names of the labels. The values of each are bounded.
    pub labels: &'static [&'static str],
    /// One sentence for operators.
    pub help: &'static str,
}

/// Defines the table of a program's metrics: a constant for each, and the slice `METRICS` with all.
///
/// ```
/// towline_service::metrics! {
///     /// Time since the start.
///     UPTIME: Gauge "towline_uptime_seconds" [] "Time since the start of the agent.";
///     /// Packets by reason.
///     DROPS: Counter "towline_dropped_packets_total" ["reason"] "Packets that were dropped.";
/// }
///
/// assert_eq!(METRICS.len(), 2);
/// assert_eq!(DROPS.labels, ["reason"]);
/// ```
#[macro_export]
macro_rules! metrics {
    ($($(#[$doc:meta])* $constant:ident: $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $($(#[$doc])*
        pub const $constant: $crate::metrics::Metric = $crate::metrics::Metric {
            name: $name,
            kind: $crate::metrics::Kind::$kind,
            labels: &[$($label),*],
            help: $help,
        };)*

        /// All metrics of this program.
        pub const METRICS: &[$crate::metrics::Metric] = &[$($constant),*];
    };
}

/// Value of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// A count.
    Count(u64),
    /// A measure.
    Measure(f64),
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<u32> for Value {
    fn from(count: u32) -> Self {
        Self::Count(count.into())
    }
}

impl From<usize> for Value {
    fn from(count: usize) -> Self {
        Self::Count(u64::try_from(count).unwrap_or(u64::MAX))
    }
}

impl From<bool> for Value {
    fn from(is_so: bool) -> Self {
        Self::Count(is_so.into())
    }
}

impl From<f64> for Value {
    fn from(measure: f64) -> Self {
        Self::Measure(measure)
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Measure(measure) if measure.is_nan() => f.write_str("NaN"),
            Self::Measure(measure) if measure.is_infinite() => {
                f.write_str(if *measure > 0.0 { "+Inf" } else { "-Inf" })
            }
            Self::Measure(measure) => write!(f, "{measure}"),
        }
    }
}

/// Text of one scrape, in the text exposition format 0.0.4 of Prometheus.
#[derive(Debug, Default)]
pub struct Exposition {
    text: String,
}

impl Exposition {
    /// Adds a metric without labels.
    pub fn one(&mut self, metric: &Metric, value: impl Into<Value>) {
        self.family(metric).sample(&[], value);
    }

    /// Begins a metric, whose samples follow. It appears once it has a sample.
    pub fn family<'a>(&'a mut self, metric: &'a Metric) -> Family<'a> {
        Family { text: &mut self.text, metric, is_begun: false }
    }

    /// Returns the text.
    pub fn text(self) -> String {
        self.text
    }
}

/// A metric whose samples are being added.
#[derive(Debug)]
pub struct Family<'a> {
    text: &'a mut String,
    metric: &'a Metric,
    is_begun: bool,
}

impl Family<'_> {
    /// Adds a sample with the values of the metric's labels, in the order of the table.
    pub fn sample(&mut self, labels: &[&str], value: impl Into<Value>) {
        let Metric { name, kind, labels: names, help } = *self.metric;
        debug_assert_eq!(labels.len(), names.len(), "labels of {name}");
        // Writing to a string cannot fail.
        if !self.is_begun {
            self.is_begun = true;
            let _ = write!(self.text, "# HELP {name} ");
            escape(self.text, help, false);
            let _ = writeln!(self.text, "\n# TYPE {name} {}", kind.word());
        }
        self.text.push_str(name);
        let mut separator = '{';
        for (label, value) in names.iter().zip(labels) {
            let _ = write!(self.text, "{separator}{label}=\"");
            escape(self.text, value, true);
            self.text.push('"');
            separator = ',';
        }
        if separator == ',' {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {}", value.into());
    }
}

/// Appends a text with the escapes of a help text, or of the value of a label.
fn escape(to: &mut String, text: &str, is_label: bool) {
    for c in text.chars() {
        match c {
            '\\' => to.push_str("\\\\"),
            '\n' => to.push_str("\\n"),
            '"' if is_label => to.push_str("\\\""),
            c => to.push(c),
        }
    }
}

/// Returns the table as a table of a document in Markdown.
pub fn markdown(metrics: &[Metric]) -> String {
    let mut text = String::from("| metric | kind | labels | what it says |\n|---|---|---|---|\n");
    for Metric { name, kind, labels, help } in metrics {
        let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
        let labels = if labels.is_empty() { "none".to_owned() } else { labels.join(", ") };
        let _ = writeln!(text, "| `{name}` | {} | {labels} | {help} |", kind.word());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Metric =
        Metric { name: "towline_a_seconds", kind: Kind::Gauge, labels: &[], help: "A \\ b." };
    const LABELLED: Metric = Metric {
        name: "towline_b_total",
        kind: Kind::Counter,
        labels: &["peer", "kind"],
        help: "B \"b\".",
    };

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let mut exposition = Exposition::default();
        exposition.one(&PLAIN, 1.5);
        let mut family = exposition.family(&LABELLED);
        family.sample(&["a\"\\\n", "x"], 2_u64);
        family.sample(&["b", "x"], true);
        exposition.family(&LABELLED);
        let expected = "# HELP towline_a_seconds A \\\\ b.\n# TYPE towline_a_seconds gauge\n\
                        towline_a_seconds 1.5\n# HELP towline_b_total B \"b\".\n\
                        # TYPE towline_b_total counter\n\
                        towline_b_total{peer=\"a\\\"\\\\\\n\",kind=\"x\"} 2\n\
                        towline_b_total{peer=\"b\",kind=\"x\"} 1\n";
        assert_eq!(exposition.text(), expected);
    }

    #[test]
    fn values_that_are_no_decimals_have_their_words() {
        let text = |value: f64| Value::Measure(value).to_string();
        assert_eq!(text(f64::NAN), "NaN");
        assert_eq!(text(f64::INFINITY), "+Inf");
        assert_eq!(text(f64::NEG_INFINITY), "-Inf");
        assert_eq!(text(0.000_25), "0.00025");
    }

    #[test]
    fn a_document_has_a_row_for_each_metric() {
        let text = markdown(&[PLAIN, LABELLED]);
        assert!(text.contains("| `towline_a_seconds` | gauge | none | A \\ b. |"), "{text}");
        assert!(text.contains("| `towline_b_total` | counter | `peer`, `kind` |"), "{text}");
    }
}
