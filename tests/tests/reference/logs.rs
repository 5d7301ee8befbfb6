//! Compares the message ids in `docs/logs.md` with the codes of the events.

use std::collections::BTreeSet;

use towline_agent::events::Event;
use towline_controller::events::MeshEvent;
use towline_proto::code::Coded as _;
use towline_service::log::message_id;

use super::{read, row};

#[test]
fn the_document_has_the_message_id_of_every_event() {
    let document = read("docs/logs.md");
    let (_, listed) = document.split_once("\n### Message ids\n").expect("the heading");
    let (listed, _) = listed.split_once("\n## ").expect("the next chapter");
    let found: BTreeSet<&str> = listed.lines().filter(|line| line.starts_with("| `")).collect();
    let codes = Event::codes().into_iter().chain(MeshEvent::codes());
    let wanted: BTreeSet<String> = codes
        .map(|code| row(&[&format!("`{code}`"), &format!("`{}`", message_id(code))]))
        .map(|row| row.trim_end().to_owned())
        .collect();
    let wanted: BTreeSet<&str> = wanted.iter().map(String::as_str).collect();
    assert_eq!(found, wanted, "change the tables of docs/logs.md");
}
