//! Publisher: writes what the nodes report into the Kubernetes API, as read-only objects of the kinds `TowlineNode`
//! and `TowlinePath`.
//!
//! It is a client of the controller like an operator's command, and runs beside it. The mesh never depends on it:
//! nothing that stands in Kubernetes is read back, but for the names of the objects of an earlier run, which are
//! removed when their nodes are gone. `deploy/kubernetes/crds.yaml` defines the kinds.

pub mod resources;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use kube::api::{
    ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams,
};
use kube::{Api, Client};
use serde_json::{Value, json};
use towline_proto::pb;

use resources::{GROUP, Key, Kind, Status, VERSION, keep_transitions, wanted};

/// Name of the writer, in the objects' managed fields and in their label.
const MANAGER: &str = "towline-publisher";
/// Label of every object that the publisher wrote.
const LABEL: &str = "app.kubernetes.io/managed-by";
/// Largest number of requests in a round. What is left follows in the next one, so that the first round in a large
/// mesh does not flood the API server.
const REQUESTS: usize = 500;
/// Maximum time to open a connection to the API server, and for the answer to a request.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What differs between the objects that exist and those that should exist.
#[derive(Debug, Clone, PartialEq)]
enum Change {
    Apply(Key, Box<Status>),
    Delete(Key),
}

/// Objects as they were written last.
#[derive(Debug, Default)]
struct Written(BTreeMap<Key, Option<Status>>);

impl Written {
    /// Returns the changes that make the objects equal to `wanted`: first those to delete.
    fn changes(&self, mut wanted: BTreeMap<Key, Status>) -> Vec<Change> {
        let gone = self.0.keys().filter(|key| !wanted.contains_key(*key));
        let mut changes: Vec<Change> = gone.cloned().map(Change::Delete).collect();
        for (key, status) in &mut wanted {
            let before = self.0.get(key).and_then(Option::as_ref);
            if let Some(before) = before {
                keep_transitions(before, status);
            }
            if before != Some(status) {
                changes.push(Change::Apply(key.clone(), Box::new(status.clone())));
            }
        }
        changes
    }

    /// Notes that a change was made.
    fn done(&mut self, change: Change) {
        match change {
            Change::Apply(key, status) => {
                self.0.insert(key, Some(*status));
            }
            Change::Delete(key) => {
                self.0.remove(&key);
            }
        }
    }
}

/// Writer of the objects.
pub struct Publisher {
    client: Client,
    written: Written,
}

impl Publisher {
    /// Connects with the credentials of `kubeconfig`, or with those of the environment: `KUBECONFIG`, the user's
    /// file, or the service account of the pod. Reads the names of the objects of an earlier run.
    pub async fn connect(kubeconfig: Option<&std::path::Path>) -> anyhow::Result<Self> {
        let mut config = match kubeconfig {
            Some(path) => {
                let read = kube::config::Kubeconfig::read_from(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                kube::Config::from_custom_kubeconfig(read, &Default::default())
                    .await
                    .with_context(|| format!("cannot use {}", path.display()))?
            }
            None => kube::Config::infer()
                .await
                .context("no credentials for Kubernetes: give --kubeconfig")?,
        };
        config.connect_timeout = Some(TIMEOUT);
        config.read_timeout = Some(TIMEOUT);
        // This fails if a provider is installed already, which is fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client =
            Client::try_from(config).context("cannot use the credentials for Kubernetes")?;
        let mut written = BTreeMap::new();
        for kind in Kind::ALL {
            let ours = ListParams::default().labels(&format!("{LABEL}={MANAGER}"));
            let found = api(&client, kind).list_metadata(&ours).await.with_context(|| {
                format!("cannot list {}: is deploy/kubernetes/crds.yaml applied?", kind.plural())
            })?;
            let names = found.items.into_iter().filter_map(|object| object.metadata.name);
            written.extend(names.map(|name| ((kind, name), None)));
        }
        Ok(Self { client, written: Written(written) })
    }

    /// Makes the objects equal to what the nodes report, and returns the number of changes that are left for the
    /// next round.
    ///
    /// # Errors
    ///
    /// If a request failed. What was written before it stays.
    pub async fn publish(
        &mut self,
        nodes: &[pb::NodeTunnels],
        now: Timestamp,
    ) -> anyhow::Result<usize> {
        let changes = self.written.changes(wanted(nodes, now));
        let left = changes.len().saturating_sub(REQUESTS);
        for change in changes.into_iter().take(REQUESTS) {
            self.write(&change).await?;
            self.written.done(change);
        }
        Ok(left)
    }

    async fn write(&self, change: &Change) -> anyhow::Result<()> {
        match change {
            Change::Apply(key @ (kind, name), status) => {
                let parameters = PatchParams::apply(MANAGER).force();
                let object = object(key, status);
                api(&self.client, *kind)
                    .patch(name, &parameters, &Patch::Apply(&object))
                    .await
                    .with_context(|| format!("cannot write {} {name}", kind.name()))?;
            }
            Change::Delete((kind, name)) => {
                let deleted = api(&self.client, *kind).delete(name, &DeleteParams::default()).await;
                match deleted {
                    Ok(_) => {}
                    // Somebody else removed it.
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => {
                        return Err(error)
                            .with_context(|| format!("cannot remove {} {name}", kind.name()));
                    }
                }
            }
        }
        Ok(())
    }
}

fn api(client: &Client, kind: Kind) -> Api<DynamicObject> {
    let kind_of = GroupVersionKind::gvk(GROUP, VERSION, kind.name());
    let resource = ApiResource::from_gvk_with_plural(&kind_of, kind.plural());
    Api::all_with(client.clone(), &resource)
}

/// Returns the whole object.
fn object((kind, name): &Key, status: &Status) -> Value {
    let status = match status {
        Status::Node(node) => json!(node),
        Status::Path(path) => json!(path),
    };
    json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": kind.name(),
        "metadata": { "name": name, "labels": { LABEL: MANAGER } },
        "status": status,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(names: &[&str], online: bool) -> BTreeMap<Key, Status> {
        let nodes: Vec<pb::NodeTunnels> = names
            .iter()
            .map(|name| pb::NodeTunnels { name: (*name).to_owned(), online, ..Default::default() })
            .collect();
        wanted(&nodes, Timestamp::UNIX_EPOCH)
    }

    fn after(written: &mut Written, wanted: BTreeMap<Key, Status>) -> Vec<String> {
        let changes = written.changes(wanted);
        let told = changes.iter().map(|change| match change {
            Change::Apply((_, name), _) => format!("+{name}"),
            Change::Delete((_, name)) => format!("-{name}"),
        });
        let told = told.collect();
        changes.into_iter().for_each(|change| written.done(change));
        told
    }

    #[test]
    fn only_what_changed_is_written() {
        let mut written = Written::default();
        assert_eq!(after(&mut written, nodes(&["a", "b"], true)), ["+a", "+b"]);
        assert!(after(&mut written, nodes(&["a", "b"], true)).is_empty());
        assert_eq!(after(&mut written, nodes(&["b"], true)), ["-a"]);
        assert_eq!(after(&mut written, nodes(&["b"], false)), ["+b"]);
    }

    #[test]
    fn objects_of_an_earlier_run_are_written_again_or_removed() {
        let key = |name: &str| (Kind::Node, name.to_owned());
        let mut written = Written(BTreeMap::from([(key("a"), None), (key("gone"), None)]));
        assert_eq!(after(&mut written, nodes(&["a"], true)), ["-gone", "+a"]);
    }

    #[test]
    fn an_object_says_who_wrote_it() {
        let (key, status) = nodes(&["a"], true).pop_first().unwrap();
        let object = object(&key, &status);
        assert_eq!(object["apiVersion"], "towline.io/v1alpha1");
        assert_eq!(object["metadata"]["labels"][LABEL], MANAGER);
        assert_eq!(object["status"]["conditions"][0]["type"], "Connected");
        assert_eq!(object["status"]["peersUp"], 0);
    }
}
