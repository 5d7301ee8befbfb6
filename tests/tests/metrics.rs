//! Checks the metrics of agent and controller: their names, the tables in `docs/metrics.md`, and that the dashboard
//! and the alert rules use metrics, labels and codes that exist.
//!
//! `UPDATE=1 cargo test -p towline-tests --test metrics` writes the tables again.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use towline_proto::code::Coded as _;
use towline_registry::NodeProblem;
use towline_service::metrics::{Kind, Metric, markdown};

/// Tables of both programs, with the names of their sections in the document.
static TABLES: [(&str, &[Metric]); 2] = [
    ("agent", towline_agent::metrics::METRICS),
    ("controller", towline_fixtures::controller::METRICS),
];
/// Labels that Prometheus adds.
const LABELS_OF_PROMETHEUS: [&str; 2] = ["instance", "job"];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn metrics() -> BTreeMap<&'static str, Metric> {
    let all = TABLES.iter().flat_map(|(_, table)| table.iter());
    all.map(|metric| (metric.name, *metric)).collect()
}

#[test]
fn names_follow_one_pattern_and_each_metric_has_a_sentence() {
    let all: Vec<&Metric> = TABLES.iter().flat_map(|(_, table)| table.iter()).collect();
    assert_eq!(metrics().len(), all.len(), "a name is used twice");
    for Metric { name, kind, labels, help } in all {
        let is_snake = |text: &str| {
            text.split('_').all(|word| {
                !word.is_empty()
                    && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
            })
        };
        assert!(name.starts_with("towline_") && is_snake(name), "{name}");
        assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
        assert!(labels.iter().all(|label| is_snake(label)), "{name}: {labels:?}");
        assert!(labels.len() <= 2, "{name}: {labels:?}");
        // A sentence, and a cell of a table.
        assert!(help.ends_with('.') && !help.contains(['\n', '|', '"']), "{name}: {help}");
    }
}

#[test]
fn the_document_has_the_tables() {
    let document = read("docs/metrics.md");
    let mut updated = document.clone();
    for (name, table) in TABLES {
        let begin = format!(
            "<!-- {name}: written by UPDATE=1 cargo test -p towline-tests --test metrics -->\n"
        );
        let end = format!("<!-- end of {name} -->");
        let (before, rest) = updated.split_once(&begin).expect("the beginning of the table");
        let (_, after) = rest.split_once(&end).expect("the end of the table");
        updated = format!("{before}{begin}{}{end}{after}", markdown(table));
    }
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path("docs/metrics.md"), &updated).expect("the document is written");
        return;
    }
    assert!(updated == document, "docs/metrics.md is outdated: run this test with UPDATE=1");
}

/// Returns every text of the dashboard with one of these keys: `expr` is an expression, `query` one of Grafana.
fn dashboard(keys: &[&str]) -> Vec<String> {
    fn collect(value: &Value, keys: &[&str], found: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    match value {
                        Value::String(text) if keys.contains(&key.as_str()) => {
                            found.push(text.clone());
                        }
                        value => collect(value, keys, found),
                    }
                }
            }
            Value::Array(list) => list.iter().for_each(|value| collect(value, keys, found)),
            _ => {}
        }
    }
    let board: Value = serde_json::from_str(&read("deploy/grafana/towline.json")).expect("JSON");
    let mut found = Vec::new();
    collect(&board, keys, &mut found);
    found
}

/// Returns every rule of the alerts.
fn rules() -> Vec<Value> {
    let rules: Value =
        serde_saphyr::from_str(&read("deploy/prometheus/alerts.yml")).expect("rules in YAML");
    let groups = rules["groups"].as_array().expect("groups");
    groups.iter().flat_map(|group| group["rules"].as_array().expect("rules")).cloned().collect()
}

/// Unit tests of the alerts, for promtool.
const ALERT_TESTS: &str = "tests/prometheus/alerts.test.yml";

/// Returns the groups of the unit tests of the alerts.
fn alert_tests() -> Vec<Value> {
    let tests: Value = serde_saphyr::from_str(&read(ALERT_TESTS)).expect("tests in YAML");
    tests["tests"].as_array().expect("groups of tests").clone()
}

/// Returns the names of our metrics in an expression, each with the selectors that follow it.
fn selectors(expression: &str) -> Vec<(String, Vec<(String, String)>)> {
    let mut found = Vec::new();
    let mut rest = expression;
    while let Some(at) = rest.find("towline_") {
        rest = &rest[at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let inside = after.strip_prefix('{').and_then(|after| after.split_once('}'));
        let pairs = inside.map_or_else(Vec::new, |(inside, _)| {
            let pairs = inside.split(',').filter_map(|pair| pair.split_once('='));
            let text = |value: &str| value.trim_matches(['~', '"', ' ']).to_owned();
            pairs
                .map(|(label, value)| (label.trim_matches(['!', ' ']).to_owned(), text(value)))
                .collect()
        });
        found.push((name.to_owned(), pairs));
        rest = after;
    }
    found
}

#[test]
fn dashboard_and_alerts_use_what_exists() {
    let metrics = metrics();
    let of_node = NodeProblem::codes();
    let codes: BTreeSet<&str> = towline_agent::codes().into_iter().chain(of_node).collect();
    let alerts = rules()
        .into_iter()
        .map(|rule| rule["expr"].as_str().expect("an alert has an expression").to_owned());
    let series = alert_tests().into_iter().flat_map(|group| {
        let series = group["input_series"].as_array().expect("series").clone();
        series.into_iter().map(|one| one["series"].as_str().expect("a series").to_owned())
    });
    let (mut used, mut wrong) = (BTreeSet::new(), Vec::new());
    for expression in dashboard(&["expr", "query"]).into_iter().chain(alerts).chain(series) {
        for (name, labels) in selectors(&expression) {
            let Some(metric) = metrics.get(name.as_str()) else {
                wrong.push(format!("{name} in: {expression}"));
                continue;
            };
            used.insert(name);
            for (label, value) in labels {
                let is_known = metric.labels.contains(&label.as_str())
                    || LABELS_OF_PROMETHEUS.contains(&label.as_str());
                let is_problem = metric.name.ends_with("problems") && label == "code";
                if !is_known || (is_problem && !value.split('|').all(|code| codes.contains(code))) {
                    wrong.push(format!("{label}={value} in: {expression}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "not in the tables:\n{}", wrong.join("\n"));
    assert!(used.len() > 20, "the expressions are found: {used:?}");
}

#[test]
fn each_alert_says_how_bad_it_is_and_what_to_do() {
    let mut names = BTreeSet::new();
    for rule in rules() {
        let name = rule["alert"].as_str().expect("a name").to_owned();
        let severity = rule["labels"]["severity"].as_str();
        assert!(matches!(severity, Some("critical" | "warning" | "info")), "{name}: {severity:?}");
        for annotation in ["summary", "description"] {
            let text = rule["annotations"][annotation].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "{name} has no {annotation}");
        }
        assert!(rule["for"].is_string(), "{name}: one bad scrape is no alert");
        assert!(names.insert(name.clone()), "{name} occurs twice");
    }
    assert!(!names.is_empty());
}

/// The last question of the first group lists every alert, and no question of the second has an answer.
#[test]
fn each_alert_is_tested_in_both_directions() {
    let tests = alert_tests();
    let questions =
        |group: usize| tests[group]["promql_expr_test"].as_array().expect("questions").iter();
    let last = questions(0).next_back().expect("a question");
    let fires: BTreeSet<String> = last["exp_samples"]
        .as_array()
        .expect("samples")
        .iter()
        .map(|sample| sample["labels"].as_str().expect("labels"))
        .map(|labels| labels.split('"').nth(1).expect("the name of an alert").to_owned())
        .collect();
    let alerts: BTreeSet<String> = rules()
        .iter()
        .map(|rule| rule["alert"].as_str().expect("an alert has a name").to_owned())
        .collect();
    assert_eq!(fires, alerts, "add the alert to {ALERT_TESTS}");
    let series = |group: usize| -> BTreeSet<String> {
        let series = tests[group]["input_series"].as_array().expect("series").iter();
        let texts = series.map(|one| one["series"].as_str().expect("a series"));
        texts.flat_map(selectors).map(|(name, _)| name).collect()
    };
    // A node problem has no other value than 1, and a problem neither: a healthy mesh has none.
    let only_sick: Vec<String> = series(0).difference(&series(1)).cloned().collect();
    assert_eq!(only_sick, ["towline_controller_node_problems", "towline_problems"]);
    let is_empty = |question: &Value| question["exp_samples"].as_array().is_some_and(Vec::is_empty);
    assert!(questions(1).count() > 1 && questions(1).all(is_empty));
}

#[test]
fn selectors_are_found_in_expressions() {
    let found =
        selectors("sum by (x) (rate(towline_a_total{b=\"c|d\", e!=\"f\"}[5m])) / towline_g");
    let pair = |label: &str, value: &str| (label.to_owned(), value.to_owned());
    let expected = [
        ("towline_a_total".to_owned(), vec![pair("b", "c|d"), pair("e", "f")]),
        ("towline_g".to_owned(), Vec::new()),
    ];
    assert_eq!(found, expected);
}

/// Text that says why a test with promtool checked nothing.
const NO_PROMTOOL: &str =
    "skipped: promtool is not installed (Debian's package `prometheus` has it)";

/// Returns promtool with these arguments, if it is installed.
fn promtool(arguments: &[&str]) -> Option<Command> {
    Command::new("promtool").arg("--version").output().ok()?;
    let mut command = Command::new("promtool");
    command.args(arguments);
    Some(command)
}

#[test]
fn promtool_accepts_the_alerts() {
    let Some(mut promtool) = promtool(&["check", "rules"]) else {
        return println!("{NO_PROMTOOL}");
    };
    let output =
        promtool.arg(path("deploy/prometheus/alerts.yml")).output().expect("promtool runs");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}{words}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn promtool_runs_the_tests_of_the_alerts() {
    let Some(mut promtool) = promtool(&["test", "rules"]) else {
        return println!("{NO_PROMTOOL}");
    };
    let output = promtool.arg(path(ALERT_TESTS)).output().expect("promtool runs");
    let words = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&words));
}

/// promtool reads no dashboards, so each expression becomes a recording rule.
#[test]
fn promtool_accepts_the_expressions_of_the_dashboard() {
    let Some(mut promtool) = promtool(&["check", "rules"]) else {
        return println!("{NO_PROMTOOL}");
    };
    let expressions = dashboard(&["expr"]);
    assert!(expressions.len() > 20, "{expressions:?}");
    let rules: Vec<Value> = expressions
        .iter()
        .enumerate()
        .map(|(number, text)| {
            // Grafana replaces the variable before it asks. Others are inside of strings.
            let expression = text.replace("$__rate_interval", "5m");
            serde_json::json!({"record": format!("dashboard:{number}"), "expr": expression})
        })
        .collect();
    let group = serde_json::json!({"name": "dashboard", "rules": rules});
    // JSON is YAML.
    let text = serde_json::json!({"groups": [group]}).to_string();
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("dashboard.yml");
    std::fs::write(&file, text).expect("the rules are written");
    let output = promtool.arg(file).output().expect("promtool runs");
    let words = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&words));
}

#[test]
fn promtool_accepts_the_text_of_a_scrape() {
    use towline_proto::pb;
    let Some(mut promtool) = promtool(&["check", "metrics"]) else {
        return println!("{NO_PROMTOOL}");
    };
    let peer = pb::PeerStatus {
        name: "office \"east\"".into(),
        state: "up".into(),
        rtt_us: Some(250),
        ..pb::PeerStatus::default()
    };
    let status = pb::StatusResponse { version: "1".into(), ..pb::StatusResponse::default() };
    let text = towline_agent::metrics::Collector::default().collect(&status, &[peer]);
    promtool.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = promtool.spawn().expect("promtool runs");
    let mut stdin = child.stdin.take().expect("its input");
    stdin.write_all(text.as_bytes()).expect("promtool reads");
    drop(stdin);
    let output = child.wait_with_output().expect("promtool ends");
    let words = String::from_utf8_lossy(&output.stderr);
    // Advice on names (status 3) is in its words too.
    assert!(output.status.success(), "{words}{}\n{text}", String::from_utf8_lossy(&output.stdout));
}
