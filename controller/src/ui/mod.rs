//! Web page of the mesh: a read-only view of what nodes report, for a browser on the controller's machine.
//!
//! There is no TLS and no login, so the page is off by default, and is served on the loopback unless the operator
//! allows another address. It holds no key and no token; events may name the
//! address that a node connected from. A browser is told to load
//! nothing from elsewhere and to run no other script. A request that names this server by a host name that is not
//! configured is refused, so that a web site whose name resolves to this address reads nothing (DNS rebinding).
//!
//! | path | content |
//! |---|---|
//! | `/`, `/style.css`, `/script.js` | the page; the script draws everything from `/api/` |
//! | `/api/mesh` | sites and nodes |
//! | `/api/matrix?site=SITE` | the matrix of all nodes, or of a site's |
//! | `/api/node?name=NAME` | a node, the tunnels that it reported, and those that others reported to it |
//! | `/api/events?after=ID` | events of the mesh |

mod answers;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use parking_lot::Mutex;
use serde::Serialize;
use towline_proto::id::MeshId;
use towline_proto::{limits, pb};
use towline_registry::Now;
use towline_service::http::{self as server, Get, Listen, Reply};
use towline_service::output;

use crate::clock;
use crate::config::UiConfig;
use crate::events::Events;
use crate::tunnels::Reported;

use answers::{EventsAnswer, MatrixAnswer, MeshAnswer, NodeAnswer};

/// Largest number of connections at the same time. A browser opens six.
const CONNECTIONS: usize = 32;
/// Time for which an answer is built from the same state, so that many browsers cost as much as one.
const FRESH: Duration = Duration::from_secs(2);
/// Headers of every response. `default-src 'none'` and the two sources forbid everything else, inline scripts and
/// styles too. The empty icon of the page is a `data:` address.
const HEADERS: &[(&str, &str)] = &[
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cache-control", "no-store"),
];

/// State that the page shows.
#[derive(Clone)]
pub struct Page {
    /// What the nodes report.
    pub reported: Reported,
    /// What happened lately.
    pub events: Arc<Events>,
    /// Id of the mesh.
    pub mesh_id: MeshId,
}

/// A page with the state that it read last.
struct Site {
    page: Page,
    hosts: Vec<String>,
    cached: Mutex<Option<(Now, Arc<[pb::NodeTunnels]>)>>,
}

/// Serves the page, if it is configured. Never returns then.
pub async fn serve(config: Option<UiConfig>, page: Page) {
    let Some(UiConfig { listen, hosts }) = config else { return };
    if !listen.ip().to_canonical().is_loopback() {
        tracing::warn!(%listen, "the web page has no login, and other machines can reach it");
    }
    let site = Arc::new(Site { page, hosts, cached: Mutex::new(None) });
    let listen = Listen { what: "web page", address: listen, connections: CONNECTIONS };
    let handle = move |get: Get| {
        let site = site.clone();
        async move {
            // A large mesh takes a while to encode. Heartbeats must not wait for it.
            let reply = tokio::task::spawn_blocking(move || site.reply(&get, clock::now())).await;
            let failed = |_| Reply::error(StatusCode::INTERNAL_SERVER_ERROR, "cannot answer\n");
            Reply { headers: HEADERS, ..reply.unwrap_or_else(failed) }
        }
    };
    server::serve(listen, handle).await;
}

impl Site {
    fn reply(&self, get: &Get, now: Now) -> Reply {
        if !get.host.as_deref().is_some_and(|host| self.is_own_host(host)) {
            return Reply::error(
                StatusCode::FORBIDDEN,
                "this host name is not allowed: use an IP address or localhost, or add it to [ui] hosts\n",
            );
        }
        match get.path.as_str() {
            "/" => Reply::ok("text/html; charset=utf-8", include_str!("page.html")),
            "/style.css" => Reply::ok("text/css; charset=utf-8", include_str!("style.css")),
            "/script.js" => Reply::ok("text/javascript; charset=utf-8", include_str!("script.js")),
            "/api/mesh" => self.json(MeshAnswer::of(&self.nodes(now))),
            "/api/matrix" => {
                let site = argument(&get.query, "site");
                self.json(MatrixAnswer::of(&self.nodes(now), site))
            }
            "/api/node" => {
                let name = argument(&get.query, "name").unwrap_or_default();
                match NodeAnswer::of(&self.nodes(now), name) {
                    Some(answer) => self.json(answer),
                    None => Reply::error(StatusCode::NOT_FOUND, "there is no such node\n"),
                }
            }
            "/api/events" => {
                let after = argument(&get.query, "after").unwrap_or_default();
                match after.parse() {
                    Ok(id) => self.events(Some(id)),
                    Err(_) if after.is_empty() => self.events(None),
                    Err(_) => {
                        Reply::error(StatusCode::BAD_REQUEST, "an event id looks like 12-345\n")
                    }
                }
            }
            _ => Reply::error(StatusCode::NOT_FOUND, "there is no such page\n"),
        }
    }

    fn events(&self, after: Option<towline_service::events::EventId>) -> Reply {
        self.json(EventsAnswer { events: self.page.events.after(after) })
    }

    /// Returns all nodes, as they were at most [`FRESH`] ago.
    fn nodes(&self, now: Now) -> Arc<[pb::NodeTunnels]> {
        let mut cached = self.cached.lock();
        match &*cached {
            Some((at, nodes)) if now.since(at.mono) < FRESH => nodes.clone(),
            _ => {
                let nodes: Arc<[_]> = self.page.reported.nodes(None, limits::NODES, now).into();
                *cached = Some((now, nodes.clone()));
                nodes
            }
        }
    }

    /// Returns the reply with an answer, the id of the mesh and the version.
    fn json(&self, answer: impl Serialize) -> Reply {
        let document = Document {
            mesh_id: self.page.mesh_id.to_string(),
            version: towline_proto::VERSION,
            answer,
        };
        match output::json_line(&document) {
            Ok(text) => Reply::ok("application/json", text),
            Err(_) => Reply::error(StatusCode::INTERNAL_SERVER_ERROR, "cannot encode the answer\n"),
        }
    }

    /// Returns whether a browser may call this server by the value of a header `Host`. An IP address is not a
    /// name, so no web site can have it.
    fn is_own_host(&self, host: &str) -> bool {
        let name = match host.strip_prefix('[') {
            Some(rest) => match rest.split_once(']') {
                Some((address, port)) if port.is_empty() || is_port(port) => address,
                _ => return false,
            },
            None => match host.rfind(':') {
                Some(at) if is_port(&host[at..]) => &host[..at],
                Some(_) => return false,
                None => host,
            },
        };
        let name = name.to_ascii_lowercase();
        name.parse::<IpAddr>().is_ok() || name == "localhost" || self.hosts.contains(&name)
    }
}

/// Returns whether a text is a colon and a port.
fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok())
}

/// Returns the value of an argument of a query. Names of nodes and sites need no escapes, so there are none.
fn argument<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let arguments = query.split('&').filter_map(|argument| argument.split_once('='));
    arguments
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| value)
        .find(|value| !value.is_empty())
}

/// An answer in its frame.
#[derive(Serialize)]
struct Document<A> {
    mesh_id: String,
    version: &'static str,
    #[serde(flatten)]
    answer: A,
}

#[cfg(test)]
mod tests {
    use towline_registry::sessions::Sessions;

    use super::*;
    use crate::view::{NodeView, View, ViewChange};

    fn site() -> Site {
        let view = View::default();
        view.apply(vec![ViewChange::Node(Arc::new(NodeView {
            id: towline_proto::id::NodeId([1; 16]),
            name: "a".parse().unwrap(),
            site: Some("dc".parse().unwrap()),
            grant: pb::Signed::default(),
            record: None,
            token: towline_proto::id::TokenId([1; 8]),
            joined_at: 0,
            problems: Vec::new(),
        }))]);
        let reported = Reported {
            view: Arc::new(view),
            sessions: Arc::new(Mutex::new(Sessions::new(Duration::from_secs(1)))),
            summaries: Arc::default(),
        };
        let page = Page { reported, events: Arc::new(Events::new(1)), mesh_id: MeshId([7; 16]) };
        Site { page, hosts: vec!["mesh.example".to_owned()], cached: Mutex::new(None) }
    }

    fn ask(target: &str) -> (StatusCode, String) {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let get =
            Get { path: path.into(), query: query.into(), host: Some("127.0.0.1:7480".into()) };
        let reply = site().reply(&get, clock::now());
        (reply.status, String::from_utf8(reply.body.to_vec()).unwrap())
    }

    #[test]
    fn no_web_site_can_read_the_page_by_a_name_of_its_own() {
        let site = site();
        for own in [
            "127.0.0.1:7480",
            "127.0.0.1",
            "[::1]:7480",
            "[::1]",
            "localhost:7480",
            "LOCALHOST",
            "198.19.0.1:80",
            "mesh.example",
            "Mesh.Example:443",
        ] {
            assert!(site.is_own_host(own), "{own}");
        }
        for other in [
            "",
            "evil.example:7480",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "[::1].evil.example",
            "[::1",
            "::1",
            "localhost:",
            "localhost:80:80",
            "mesh.example.",
            "user@127.0.0.1",
        ] {
            assert!(!site.is_own_host(other), "{other}");
        }
        let none = site.reply(&Get { path: "/".into(), ..Get::default() }, clock::now());
        assert_eq!(none.status, StatusCode::FORBIDDEN);
    }

    #[test]
    fn the_page_and_its_answers_are_served() {
        for path in ["/", "/style.css", "/script.js"] {
            assert_eq!(ask(path).0, StatusCode::OK, "{path}");
        }
        for (path, part) in [
            ("/api/mesh", "\"sites\":[{\"name\":\"dc\",\"nodes\":1,\"offline\":1"),
            ("/api/matrix", "\"names\":[\"a\"]"),
            ("/api/matrix?site=other", "\"names\":[]"),
            ("/api/node?name=a", "\"reported_seconds\":null"),
            ("/api/events", "\"code\":\"controller-started\""),
            ("/api/events?after=1-1", "\"events\":[]"),
        ] {
            let (status, text) = ask(path);
            assert_eq!(status, StatusCode::OK, "{path}");
            assert!(text.contains(part) && text.contains("\"mesh_id\":\"0707"), "{path}: {text}");
        }
        assert_eq!(ask("/api/node?name=b").0, StatusCode::NOT_FOUND);
        assert_eq!(ask("/api/events?after=x").0, StatusCode::BAD_REQUEST);
        assert_eq!(ask("/../etc/passwd").0, StatusCode::NOT_FOUND);
    }

    #[test]
    fn the_page_loads_nothing_from_elsewhere_and_has_no_inline_script() {
        let page = include_str!("page.html");
        let script = include_str!("script.js");
        for text in [page, script, include_str!("style.css")] {
            assert!(!text.contains("://") && !text.contains("@import"), "an external resource");
        }
        assert_eq!(page.matches("<script").count(), 1);
        assert!(!page.contains(" style=") && !page.contains(" onclick="));
        for markup in ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
            assert!(!script.contains(markup), "{markup}");
        }
    }
}
