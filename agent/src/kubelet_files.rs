//! What the configuration of a kubelet on this machine says, before the kubelet runs.

use std::path::{Path, PathBuf};

use crate::install::Tree;

/// Files and directories with arguments of a kubelet: environment files and drop-ins of kubeadm's unit,
/// k3s and RKE2 (`kubelet-arg` and their own `cloud-provider-...`), k0s and MicroK8s.
const PLACES: [&str; 15] = [
    "/etc/default/kubelet",
    "/etc/sysconfig/kubelet",
    "/var/lib/kubelet/kubeadm-flags.env",
    "/etc/systemd/system/kubelet.service",
    "/etc/systemd/system/kubelet.service.d",
    "/usr/lib/systemd/system/kubelet.service.d",
    "/etc/rancher/k3s/config.yaml",
    "/etc/rancher/k3s/config.yaml.d",
    "/etc/systemd/system/k3s.service",
    "/etc/systemd/system/k3s-agent.service",
    "/etc/rancher/rke2/config.yaml",
    "/etc/rancher/rke2/config.yaml.d",
    "/etc/systemd/system/k0sworker.service",
    "/etc/systemd/system/k0scontroller.service",
    "/var/snap/microk8s/current/args/kubelet",
];
/// Programs and units of a kubelet of its own. k3s, RKE2 and k0s are left out: they balance over the API servers
/// by themselves.
const KUBELETS: [&str; 6] = [
    "/usr/bin/kubelet",
    "/usr/local/bin/kubelet",
    "/opt/bin/kubelet",
    "/etc/systemd/system/kubelet.service",
    "/usr/lib/systemd/system/kubelet.service",
    "/lib/systemd/system/kubelet.service",
];
/// Greatest size of a file that is read, in bytes.
const FILE_BYTES: u64 = 1 << 20;

/// Returns whether a tree has a kubelet that can use the API endpoint.
pub(crate) fn has_kubelet(tree: &Tree) -> bool {
    KUBELETS.iter().any(|place| tree.path(place).is_file())
}

/// Returns the file of a tree, as a path inside the tree, by which a kubelet waits for an external cloud
/// controller manager.
pub(crate) fn external_cloud_provider(tree: &Tree) -> Option<PathBuf> {
    files(tree).into_iter().find(|path| {
        let path = tree.path(path);
        let is_small = std::fs::metadata(&path).is_ok_and(|found| found.len() <= FILE_BYTES);
        is_small && std::fs::read_to_string(path).is_ok_and(|text| names_external(&text))
    })
}

/// Returns the existing files, as paths inside the tree.
fn files(tree: &Tree) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for place in PLACES.map(Path::new) {
        match std::fs::read_dir(tree.path(place)) {
            Ok(entries) => {
                let mut names: Vec<_> =
                    entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
                names.sort();
                files.extend(names.into_iter().map(|name| place.join(name)));
            }
            Err(_) => files.push(place.to_owned()),
        }
    }
    files
}

/// Returns whether a file sets the argument, in the form of a command line or of YAML.
fn names_external(text: &str) -> bool {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines.into_iter().any(|line| {
        line.split("cloud-provider").skip(1).any(|rest| {
            let rest = rest.trim_start_matches("-name");
            let value = rest.trim_start_matches(['=', ':', ' ', '"', '\'']);
            value.len() < rest.len() && value.starts_with("external")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_external_cloud_provider_is_found_where_installers_write_it() {
        for (place, text) in [
            ("/etc/default/kubelet", "KUBELET_EXTRA_ARGS=\"--cloud-provider=external --v=2\"\n"),
            ("/etc/sysconfig/kubelet", "KUBELET_EXTRA_ARGS=--cloud-provider external\n"),
            ("/var/lib/kubelet/kubeadm-flags.env", "A=\"--cloud-provider=external\"\n"),
            (
                "/etc/systemd/system/kubelet.service.d/20-cloud.conf",
                "X=--cloud-provider=external\n",
            ),
            ("/etc/rancher/k3s/config.yaml", "kubelet-arg:\n  - \"cloud-provider=external\"\n"),
            ("/etc/rancher/rke2/config.yaml.d/a.yaml", "cloud-provider-name: \"external\"\n"),
            ("/etc/rancher/rke2/config.yaml", "kubelet-arg: cloud-provider=external\n"),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let tree = Tree::new(Some(directory.path()));
            assert_eq!(external_cloud_provider(&tree), None);
            let path = tree.path(place);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            assert_eq!(external_cloud_provider(&tree), Some(place.into()), "{place}");
        }
    }

    #[test]
    fn other_providers_and_comments_are_not_external() {
        for text in [
            "KUBELET_EXTRA_ARGS=--cloud-provider=aws\n",
            "# --cloud-provider=external\n",
            "disable-cloud-controller: true\n",
            "",
        ] {
            assert!(!names_external(text), "{text}");
        }
    }
}
