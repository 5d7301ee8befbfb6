//! Checks the files that are shipped with the programs: they parse, and contain what they promise.
#![expect(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use towline_tests::checkout;

fn deploy(path: &str) -> PathBuf {
    checkout::root().join("deploy").join(path)
}

fn read(path: &str) -> String {
    let path = deploy(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn yaml(text: &str) -> Value {
    serde_saphyr::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// Returns every document of a YAML file, without those that contain only comments.
fn documents(text: &str) -> Vec<Value> {
    let blank = |document: &&str| {
        document.lines().any(|line| !line.trim().is_empty() && !line.trim().starts_with('#'))
    };
    text.split("\n---\n").filter(blank).map(yaml).collect()
}

fn names(directory: &str, extension: &str) -> Vec<String> {
    let mut found: Vec<String> = std::fs::read_dir(deploy(directory))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(extension))
        .map(|name| format!("{directory}/{name}"))
        .collect();
    found.sort();
    assert!(!found.is_empty(), "nothing in {directory}");
    found
}

/// Renders a template of the chart. Templates use only values, as they are or as JSON, and whole-file
/// conditions, so that a few lines can render them and the test does not need Helm.
fn rendered(template: &str) -> String {
    let values = yaml(&read("helm/towline/values.yaml"));
    let mut text = String::new();
    for line in read(template).lines().filter(|line| !line.starts_with("{{-")) {
        let mut rest = line;
        while let Some((before, after)) = rest.split_once("{{ ") {
            let (expression, after) = after.split_once(" }}").expect("an expression ends");
            text.push_str(before);
            text.push_str(&value(&values, expression));
            rest = after;
        }
        text.push_str(rest);
        text.push('\n');
    }
    text
}

fn value(values: &Value, expression: &str) -> String {
    if expression == ".Release.Namespace" {
        return "towline".to_owned();
    }
    let path = expression.strip_prefix(".Values.").expect("a value");
    let (path, is_json) = match path.strip_suffix(" | toJson") {
        Some(path) => (path, true),
        None => (path, false),
    };
    let found = path.split('.').fold(values, |at, key| &at[key]);
    if is_json {
        return found.to_string();
    }
    found.as_str().unwrap_or_else(|| panic!("{expression} is not among the values")).to_owned()
}

fn containers(workload: &Value) -> Vec<&Value> {
    let pod = &workload["spec"]["template"]["spec"];
    ["initContainers", "containers"]
        .iter()
        .flat_map(|key| pod[*key].as_array().into_iter().flatten())
        .collect()
}

#[test]
fn the_plain_manifests_are_the_chart_with_its_default_values() {
    for name in ["agent", "controller"] {
        let chart = rendered(&format!("helm/towline/templates/{name}.yaml"));
        let plain = deploy(&format!("kubernetes/{name}.yaml"));
        if std::env::var_os("TOWLINE_WRITE").is_some() {
            std::fs::write(&plain, &chart).unwrap();
        }
        let found = std::fs::read_to_string(&plain).unwrap_or_default();
        assert_eq!(found, chart, "write {} again: TOWLINE_WRITE=1 cargo test", plain.display());
    }
}

#[test]
fn every_switch_and_value_of_the_chart_is_there() {
    let values = yaml(&read("helm/towline/values.yaml"));
    for name in ["agent", "controller"] {
        let template = read(&format!("helm/towline/templates/{name}.yaml"));
        assert!(template.starts_with(&format!("{{{{- if .Values.{name}.enabled }}}}\n")));
        assert!(template.ends_with("{{- end }}\n"));
        assert_eq!(values[name]["enabled"], Value::Bool(true));
    }
    let chart = yaml(&read("helm/towline/Chart.yaml"));
    assert_eq!(chart["apiVersion"], "v2");
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn a_pod_monitor_selects_the_pods_of_each_program() {
    let template = read("helm/towline/templates/podmonitor.yaml");
    assert!(template.starts_with("{{- if .Values.podMonitor.enabled }}\n"));
    assert!(template.ends_with("{{- end }}\n"));
    let values = yaml(&read("helm/towline/values.yaml"));
    assert_eq!(values["podMonitor"]["enabled"], false, "most clusters have no such kind");
    let monitors = documents(&rendered("helm/towline/templates/podmonitor.yaml"));
    assert_eq!(monitors.len(), 2);
    for (monitor, name) in monitors.iter().zip(["agent", "controller"]) {
        let pods = documents(&read(&format!("kubernetes/{name}.yaml")));
        let workload = pods.iter().find(|one| one["spec"]["template"].is_object()).unwrap();
        let labels = &workload["spec"]["template"]["metadata"]["labels"];
        assert_eq!(monitor["kind"], "PodMonitor");
        assert_eq!(monitor["spec"]["selector"]["matchLabels"], *labels);
        let relabelings = monitor["spec"]["podMetricsEndpoints"][0]["relabelings"].as_array();
        let port = values["podMonitor"][format!("{name}Port")].as_str().unwrap();
        let replacements =
            relabelings.unwrap().iter().filter_map(|one| one["replacement"].as_str());
        assert_eq!(
            replacements.collect::<Vec<_>>(),
            [format!("$1:{port}"), format!("[$1]:{port}")]
        );
    }
}

/// Checks that a schema describes exactly the keys of these values, with their types.
fn describes(schema: &Value, values: &Value, place: &str) {
    assert!(schema["description"].is_string() || place == "values", "{place} has no description");
    let kind = match values {
        Value::Bool(_) => "boolean",
        Value::String(_) => "string",
        Value::Object(_) => "object",
        Value::Null | Value::Number(_) | Value::Array(_) => panic!("{place}: {values}"),
    };
    assert_eq!(schema["type"], kind, "{place}");
    let Some(values) = values.as_object() else { return };
    if schema["properties"].is_null() {
        // Keys of the operator, such as labels.
        assert_eq!(schema["additionalProperties"]["type"], "string", "{place}");
        assert!(values.is_empty(), "{place}");
        return;
    }
    assert_eq!(schema["additionalProperties"], false, "{place}");
    let properties = schema["properties"].as_object().unwrap();
    let described: Vec<&String> = properties.keys().filter(|key| *key != "global").collect();
    assert_eq!(described.len(), values.len(), "{place}: {described:?}");
    for (key, value) in values {
        describes(&properties[key], value, &format!("{place}.{key}"));
    }
}

#[test]
fn the_schema_of_the_chart_knows_every_value_and_no_other() {
    let schema = serde_json::from_str(&read("helm/towline/values.schema.json")).unwrap();
    describes(&schema, &yaml(&read("helm/towline/values.yaml")), "values");
}

#[test]
fn no_container_is_privileged_and_the_exceptions_are_the_documented_ones() {
    let mut workloads = 0;
    for document in names("kubernetes", ".yaml").iter().flat_map(|name| documents(&read(name))) {
        assert!(document["apiVersion"].is_string() && document["metadata"]["name"].is_string());
        if !matches!(document["kind"].as_str(), Some("DaemonSet" | "Deployment")) {
            continue;
        }
        workloads += 1;
        let pod = &document["spec"]["template"]["spec"];
        let labels = &document["spec"]["template"]["metadata"]["labels"];
        assert_eq!(document["spec"]["selector"]["matchLabels"], *labels);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert!(pod["hostPID"].is_null() && pod["hostIPC"].is_null());
        let agent = document["kind"] == "DaemonSet";
        assert_eq!(pod["hostNetwork"] == true, agent);
        for container in containers(&document) {
            let context = &container["securityContext"];
            assert!(context["privileged"].is_null());
            assert_eq!(context["readOnlyRootFilesystem"], true);
            assert_eq!(context["allowPrivilegeEscalation"], false);
            assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]));
            let added = &context["capabilities"]["add"];
            let allowed = if agent { serde_json::json!(["NET_ADMIN"]) } else { Value::Null };
            assert_eq!(*added, allowed);
            let volumes: Vec<&Value> = pod["volumes"].as_array().unwrap().iter().collect();
            for mount in container["volumeMounts"].as_array().unwrap() {
                assert!(volumes.iter().any(|volume| volume["name"] == mount["name"]), "{mount}");
            }
        }
    }
    assert_eq!(workloads, 2);
}

#[test]
fn the_agents_pod_sees_the_kubelets_own_credentials_and_no_other_key() {
    let agent = documents(&read("kubernetes/agent.yaml"));
    let pod = &agent[1]["spec"]["template"]["spec"];
    let paths: Vec<&str> = pod["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|volume| volume["hostPath"]["path"].as_str())
        .collect();
    for path in ["/etc/kubernetes/kubelet.conf", "/var/lib/kubelet/pki"] {
        assert!(paths.contains(&path), "{paths:?}");
    }
    for path in &paths {
        let keys = Path::new("/etc/kubernetes/pki");
        assert!(!keys.starts_with(path) && !Path::new(path).starts_with(keys), "{path}");
        assert!(!Path::new("/etc/kubernetes/admin.conf").starts_with(path), "{path}");
    }
}

#[test]
fn the_agents_configuration_in_the_cluster_is_one() {
    let agent = documents(&read("kubernetes/agent.yaml"));
    let text = agent[0]["data"]["agent.toml"].as_str().unwrap();
    towline_agent::config::Config::parse(text, Path::new("agent.toml")).unwrap();
}

#[test]
fn the_controllers_configuration_in_the_cluster_is_one() {
    let controller = documents(&read("kubernetes/controller.yaml"));
    let text = controller[0]["data"]["controller.toml"].as_str().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let settings = towline_controller::config::Settings::read(Some(file.path())).unwrap();
    assert_eq!(settings.metrics.listen, None);
}

#[test]
fn several_controllers_in_the_cluster_share_a_store_and_get_their_keys_as_credentials() {
    let template = read("helm/towline/templates/controllers.yaml");
    // One controller with a store of its own beside them would be another mesh.
    let start =
        "{{- if .Values.controllers.enabled }}\n{{- if .Values.controller.enabled }}{{ fail \"";
    assert!(template.starts_with(start));
    assert!(template.ends_with("{{- end }}\n"));
    let values = yaml(&read("helm/towline/values.yaml"));
    assert_eq!(values["controllers"]["enabled"], false, "it needs an etcd cluster");
    let documents = documents(&rendered("helm/towline/templates/controllers.yaml"));
    let of_kind = |kind: &str| documents.iter().find(|one| one["kind"] == kind).unwrap();

    let text = of_kind("ConfigMap")["data"]["controller.toml"].as_str().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let settings = towline_controller::config::Settings::read(Some(file.path())).unwrap();
    assert!(settings.etcd.shared && !settings.etcd.plaintext);

    let deployment = of_kind("Deployment");
    assert_eq!(deployment["spec"]["replicas"], 3);
    assert_eq!(deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"], 0);
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    assert_eq!(deployment["spec"]["selector"]["matchLabels"], *labels);
    for kind in ["PodDisruptionBudget", "Service"] {
        let selector = &of_kind(kind)["spec"]["selector"];
        let selector = selector.get("matchLabels").unwrap_or(selector);
        assert_eq!(selector, labels, "{kind}");
    }
    let pod = &deployment["spec"]["template"]["spec"];
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    let [container] = containers(deployment)[..] else { panic!("one container") };
    let context = &container["securityContext"];
    assert_eq!(context["readOnlyRootFilesystem"], true);
    assert_eq!(context["capabilities"], serde_json::json!({ "drop": ["ALL"] }));
    let mounted = |volume: &str| {
        let mounts = container["volumeMounts"].as_array().unwrap();
        mounts.iter().find(|mount| mount["name"] == volume).unwrap()["mountPath"].clone()
    };
    let environment = container["env"].as_array().unwrap();
    let variable = |name: &str| {
        &environment.iter().find(|variable| variable["name"] == name).unwrap()["value"]
    };
    assert_eq!(*variable("CREDENTIALS_DIRECTORY"), mounted("authority"));
    let state = Path::new(variable("TOWLINE_CONTROLLER_STATE_DIR").as_str().unwrap());
    assert_eq!(state.parent(), mounted("state").as_str().map(Path::new));
    for volume in pod["volumes"].as_array().unwrap() {
        assert!(volume["persistentVolumeClaim"].is_null(), "they are stateless: {volume}");
    }
}

#[test]
fn cloud_init_says_only_what_cloud_init_knows() {
    let known = ["package_update", "packages", "write_files", "runcmd"];
    let mut planes = BTreeMap::new();
    for name in names("cloud-init", ".yaml") {
        let text = read(&name);
        assert!(text.starts_with("#cloud-config\n"), "{name}");
        let mut document = yaml(&text);
        for (key, _) in document.as_object().unwrap() {
            assert!(known.contains(&key.as_str()), "{name}: {key}");
        }
        for file in document["write_files"].as_array().unwrap() {
            let mode = file["permissions"].as_str().expect("permissions are a string");
            assert!(file["path"].as_str().unwrap().starts_with('/') && file["content"].is_string());
            let secret = file["path"] == "/etc/towline/token";
            assert_eq!(mode, if secret { "0600" } else { "0755" }, "{name}");
            if !secret {
                parses_as_shell(file["content"].as_str().unwrap());
            }
        }
        for command in document["runcmd"].as_array().unwrap() {
            assert!(command.as_array().unwrap().iter().all(Value::is_string), "{name}");
            // What is fetched is compared with its checksum before it is installed.
            let text = command.to_string();
            let (fetch, check) = (text.find("curl"), text.find("| sha256sum -c - && dpkg -i"));
            assert!(fetch.is_none() || fetch < check, "{name}: {text}");
        }
        if name.contains("control-plane") {
            // Only the way in which the public address is found may differ.
            let address = &mut document["write_files"][0];
            assert_eq!(address["path"], "/usr/local/sbin/towline-public-address");
            address["content"] = Value::Null;
            planes.insert(name, document);
        }
    }
    let planes: Vec<Value> = planes.into_values().collect();
    assert_eq!(planes.len(), 3);
    assert!(planes.windows(2).all(|pair| pair[0] == pair[1]));
}

/// Checks that `sh` parses a text. Every system with cloud-init has `sh`; without it, nothing is
/// checked.
fn parses_as_shell(text: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    if let Ok(output) = Command::new("sh").arg("-n").arg(file.path()).output() {
        assert!(output.status.success(), "{}\n{text}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn units_name_their_order_and_give_up_what_they_do_not_need() {
    let agent = read("systemd/towline.service");
    let before = agent.lines().find_map(|line| line.strip_prefix("Before=")).unwrap();
    for unit in [
        "containerd.service",
        "kubelet.service",
        "k3s-agent.service",
        "rke2-agent.service",
        "k0sworker.service",
        "snap.microk8s.daemon-kubelite.service",
    ] {
        assert!(before.split(' ').any(|name| name == unit), "{unit}");
    }
    for line in ["Type=notify", "WatchdogSec=20", "NoNewPrivileges=yes", "ProtectSystem=strict"] {
        assert!(agent.lines().any(|found| found == line), "{line}");
    }
    for (unit, user, capabilities) in [
        ("towline.service", "towline", "CAP_NET_ADMIN"),
        ("towline-guard.service", "towline", "CAP_NET_ADMIN"),
        ("towline-controller.service", "towline-controller", ""),
    ] {
        let text = read(&format!("systemd/{unit}"));
        let values = |key: &str| -> Vec<&str> {
            text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('=')).collect()
        };
        for (key, value) in [
            ("User", user),
            ("Group", user),
            ("StateDirectory", user),
            ("StateDirectoryMode", "0700"),
            ("CapabilityBoundingSet", capabilities),
            ("AmbientCapabilities", capabilities),
            ("LimitCORE", "0"),
            ("KeyringMode", "private"),
            ("ProtectKernelTunables", "yes"),
            ("ProtectProc", "invisible"),
            ("NoNewPrivileges", "yes"),
        ] {
            assert_eq!(values(key), [value], "{key} of {unit}");
        }
        // A private /tmp needs free disk space at the start.
        assert!(values("PrivateTmp").is_empty(), "{unit}");
        // These filters would have no effect after one that allows the same calls again.
        assert_eq!(values("SystemCallFilter"), ["@system-service", "~@privileged @resources"]);
        let hidden = values("InaccessiblePaths").join(" ");
        assert!(hidden.split(' ').any(|path| path == "-/etc/shadow"), "{unit}");
        assert!(hidden.contains("-/etc/kubernetes"), "{unit}");
    }
    // The helper runs as root, but without root's rights over other users' files.
    let socket = read("systemd/towline-helper.socket");
    for line in ["ListenSequentialPacket=/run/towline/helper.sock", "Accept=yes"] {
        assert!(socket.lines().any(|found| found == line), "{line}");
    }
    let helper = read("systemd/towline-helper@.service");
    for line in [
        "CapabilityBoundingSet=CAP_BPF CAP_NET_ADMIN CAP_SYS_ADMIN",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "RestrictAddressFamilies=AF_UNIX",
    ] {
        assert!(helper.lines().any(|found| found == line), "{line}");
    }
    assert!(
        agent
            .lines()
            .any(|line| line.starts_with("Wants=") && line.contains("towline-helper.socket"))
    );
    // Root writes the arguments of the kubelet; the agent's directory does not belong to root.
    let kubelet = read("systemd/kubelet.service.d/10-towline.conf");
    assert!(!kubelet.contains("/run/towline/"), "{kubelet}");
    let guard = read("systemd/towline-guard.service");
    for line in [
        "Type=notify",
        "ExecStart=/usr/bin/towline guard --watch",
        "Restart=on-failure",
        // The network would begin without guards.
        "TimeoutStartSec=infinity",
    ] {
        assert!(guard.lines().any(|found| found == line), "{line}");
    }
    assert!(!guard.contains("ReadWritePaths"), "it only reads");
    let controller = read("systemd/towline-controller.service");
    assert!(controller.lines().any(|line| line == "Type=notify"), "{controller}");
    for drop_in in ["kubelet.service.d", "k3s-agent.service.d", "rke2-agent.service.d"] {
        let text = read(&format!("systemd/{drop_in}/10-towline.conf"));
        assert!(text.contains("After=towline.service"));
        assert!(text.contains("towline node-ip --kubelet"), "{text}");
        // systemd ends a start after 90 s by default, and the reason would be lost.
        let wait = text.lines().find_map(|line| line.split_once("towline wait --timeout "));
        let seconds: u64 = wait.unwrap().1.parse().unwrap();
        assert!((31..90).contains(&seconds), "{drop_in}: {seconds}");
    }
}

#[test]
fn the_units_are_exposed_no_more_than_they_promise() {
    let limits = [
        ("towline.service", 2.0),
        ("towline-guard.service", 2.0),
        ("towline-controller.service", 1.5),
        ("towline-join.service", 3.0),
        ("towline-helper@.service", 2.1),
    ];
    for (unit, limit) in limits {
        let ran = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--no-pager"])
            .arg(deploy(&format!("systemd/{unit}")))
            .output();
        let Ok(output) = ran else { return eprintln!("skipped: systemd-analyze is not installed") };
        let words = String::from_utf8_lossy(&output.stdout);
        let level = words
            .lines()
            .find_map(|line| {
                line.split_once("exposure level for ")?.1.split_once(": ")?.1.split(' ').next()
            })
            .and_then(|level| level.parse::<f64>().ok());
        let Some(level) = level else {
            let error = String::from_utf8_lossy(&output.stderr);
            return eprintln!("skipped: this systemd-analyze cannot check files: {error}");
        };
        println!("{unit}: {level}");
        assert!(level <= limit, "{words}");
    }
}

#[test]
fn no_unit_needs_room_on_the_disk_to_start() {
    // systemd makes directories under /tmp for these.
    for unit in names("systemd", ".service") {
        let text = read(&unit);
        for setting in ["PrivateDevices=yes", "PrivateTmp=yes"] {
            assert!(!text.lines().any(|line| line == setting), "{unit}: {setting}");
        }
    }
}

#[test]
fn the_users_of_the_units_are_declared() {
    let users = read("systemd/sysusers.d/towline.conf");
    let declared: Vec<&str> =
        users.lines().filter_map(|line| line.strip_prefix("u ")?.split(' ').next()).collect();
    assert_eq!(declared, ["towline", "towline-controller"]);
    let Ok(output) = Command::new("systemd-sysusers").arg("--version").output() else {
        return eprintln!("skipped: systemd-sysusers is not installed");
    };
    assert!(output.status.success());
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir(root.path().join("etc")).unwrap();
    let output = Command::new("systemd-sysusers")
        .arg(format!("--root={}", root.path().display()))
        .arg(deploy("systemd/sysusers.d/towline.conf"))
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    let Ok(passwd) = std::fs::read_to_string(root.path().join("etc/passwd")) else {
        return eprintln!("skipped: systemd-sysusers cannot write files: {words}");
    };
    for user in declared {
        assert!(passwd.lines().any(|line| line.starts_with(&format!("{user}:"))), "{passwd}");
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let Ok(version) = Command::new("systemd-analyze").arg("--version").output() else {
        eprintln!("skipped: systemd-analyze is not installed");
        return;
    };
    assert!(version.status.success());
    let directory = tempfile::tempdir().unwrap();
    let mut units = Vec::new();
    for name in names("systemd", ".service")
        .into_iter()
        .chain(names("systemd", ".timer"))
        .chain(names("systemd", ".socket"))
    {
        // The programs are not installed where tests run.
        let text = read(&name)
            .replace("/usr/bin/towline-controller ", "/bin/true ")
            .replace("/usr/bin/towline-helper", "/bin/true")
            .replace("/usr/bin/towline ", "/bin/true ");
        let path = directory.path().join(Path::new(&name).file_name().unwrap());
        std::fs::write(&path, text).unwrap();
        units.push(path);
    }
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(&units)
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    let ours: Vec<&str> = words.lines().filter(|line| line.contains("towline")).collect();
    assert!(ours.is_empty(), "{words}");
}

#[test]
fn a_release_is_verified_only_as_it_was_signed_and_with_the_key_that_is_known() {
    if Command::new("ssh-keygen").arg("-?").output().is_err() {
        return eprintln!("skipped: ssh-keygen is not installed");
    }
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    let run = |program: &str, arguments: &[&Path]| {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(root.path()).stdin(std::process::Stdio::null());
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let script = |name: &str, first: &Path| {
        let script = deploy(&format!("release/{name}.sh"));
        run("sh", &[&script, first, &at("release")])
    };
    for key in ["known", "other"] {
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", key, "-f"])
            .arg(at(key))
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
    let public = std::fs::read_to_string(at("known.pub")).unwrap();
    let line = format!("release@towline namespaces=\"towline-release\" {public}");
    std::fs::write(at("signers"), line).unwrap();
    std::fs::create_dir(at("release")).unwrap();
    let write = |name: &str, text: &str| std::fs::write(at("release").join(name), text).unwrap();
    // The checksum of `abc`.
    let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    write("towline.deb", "abc");
    write("SHA256SUMS", &format!("{sum}  towline.deb\n"));

    let (known, other, signers) = (at("known"), at("other"), at("signers"));
    let verified = || script("verify", &signers);
    let signed = |key: &Path| script("sign", key);
    assert!(!verified().0, "it has no signature yet");
    assert_eq!(signed(&known), (true, String::new()));
    assert!(verified().0, "{}", verified().1);

    write("towline.deb", "abd");
    assert!(!verified().0, "another file");
    assert!(!signed(&known).0, "what does not fit its checksums is not signed");
    write("towline.deb", "abc");
    assert!(verified().0, "{}", verified().1);
    write("SHA256SUMS", &format!("{sum}  towline.deb\n{sum}  more.deb\n"));
    assert!(!verified().0, "other checksums");
    write("SHA256SUMS", &format!("{sum}  towline.deb\n"));
    assert_eq!(signed(&other), (true, String::new()));
    assert!(!verified().0, "another key");
    assert_eq!(signed(&known), (true, String::new()));
    assert!(verified().0, "{}", verified().1);

    // A release of which nothing is there is not verified either.
    std::fs::remove_file(at("release/towline.deb")).unwrap();
    assert!(!verified().0, "no file");
    for name in ["sign", "verify"] {
        parses_as_shell(&read(&format!("release/{name}.sh")));
    }
}

#[test]
fn the_terraform_example_is_hcl_and_keeps_tokens_out_of_plan_and_state() {
    let text = read("terraform/main.tf");
    let body: hcl_edit::structure::Body = text.parse().unwrap_or_else(|error| panic!("{error}"));
    // What a data source or an output has is in the state.
    assert_eq!(body.get_blocks("data").count(), 0);
    let outputs: Vec<String> =
        body.get_blocks("output").map(|block| block.body.to_string()).collect();
    assert!(outputs.iter().all(|output| output.contains(".yaml")), "names of files: {outputs:?}");
    let workers: Vec<String> =
        body.get_blocks("resource").map(|block| block.body.to_string()).collect();
    for command in ["create", "destroy"] {
        let command = format!("$SCRIPT\\\" {command} ");
        assert!(workers.iter().any(|worker| worker.contains(&command)), "{workers:?}");
    }
    assert!(workers.iter().any(|worker| worker.contains("when    = destroy")));
    // The file is where the output says, and a checkout that moved removes no node.
    let triggers = "triggers_replace = [each.key, each.value, var.directory]";
    assert!(workers.iter().any(|worker| worker.contains(triggers)), "{workers:?}");
    assert!(!text.contains("self.input.script"));
    assert!(read("cloud-init/worker.yaml").contains("content: TOKEN\n"));
}

#[test]
fn a_worker_that_is_destroyed_has_neither_a_token_nor_a_node_left() {
    use std::os::unix::fs::PermissionsExt as _;

    if Command::new("jq").arg("--version").output().is_err() {
        return eprintln!("skipped: jq is not installed");
    }
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(name);
    // A controller that writes down what it is asked, and has a used and an open token of the name.
    let controller = r#"#!/bin/sh
        echo "$*" >>"$CALLS"
        case "$1 $2" in
        "$FAILS") exit 1 ;;
        'token create') echo '{"token": "tl1-x&y", "id": "0004"}' ;;
        'token list') echo '[{"id": "0001", "name": "gpu-1", "state": "used"},
            {"id": "0002", "name": "gpu-1", "state": "open"},
            {"id": "0003", "name": "gpu-2", "state": "open"}]' ;;
        'node list') echo '[{"name": "gpu-1"}]' ;;
        esac
    "#;
    // The jq of this machine, which fails where a part of its arguments is named.
    let jq = r#"#!/bin/sh
        if [ -n "$FAILS" ]; then
            case "$*" in
            *"$FAILS"*) exit 5 ;;
            esac
        fi
        PATH=${PATH#*:}
        exec jq "$@"
    "#;
    for (name, text) in [("bin/towline-controller", controller), ("bin/jq", jq)] {
        std::fs::create_dir_all(at("bin")).unwrap();
        std::fs::write(at(name), text).unwrap();
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(at(name), mode).unwrap();
    }
    let path = format!("{}:{}", at("bin").display(), std::env::var("PATH").unwrap());
    let run = |arguments: &[&str], fails: &str| {
        let _ = std::fs::remove_file(at("calls"));
        let mut command = Command::new("sh");
        command.arg(deploy("tokens/worker.sh")).args(arguments).arg(at("out"));
        command.env("PATH", &path).env("CALLS", at("calls")).env("FAILS", fails);
        let succeeds = command.output().unwrap().status.success();
        let calls = std::fs::read_to_string(at("calls")).unwrap_or_default();
        (succeeds, calls.lines().map(ToOwned::to_owned).collect::<Vec<_>>())
    };

    let (succeeds, calls) = run(&["create", "gpu-1", "10.244.1.0/24"], "");
    assert!(succeeds);
    let create = "token create -o json --ttl 24h --name gpu-1 --prefix 10.244.1.0/24";
    assert_eq!(calls, ["token list -o json", "token revoke 0002", create]);
    let file = at("out/gpu-1.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, read("cloud-init/worker.yaml").replace("content: TOKEN", "content: tl1-x&y"));
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(at("out").metadata().unwrap().permissions().mode() & 0o777, 0o700);

    // Where the controller cannot be asked, or its answer cannot be read, nothing counts as removed.
    for fails in ["token list", "token revoke", "node list", "node remove", "select(", "any("] {
        assert!(!run(&["destroy", "gpu-1"], fails).0, "{fails}");
        assert!(file.exists(), "{fails}");
    }
    let (succeeds, calls) = run(&["destroy", "gpu-1"], "");
    assert!(succeeds && !file.exists());
    let asked = ["token list -o json", "token revoke 0002", "node list -o json"];
    assert_eq!(calls, [&asked[..], &["node remove gpu-1"]].concat());
    // Also of a worker that never joined.
    let (succeeds, calls) = run(&["destroy", "gpu-3"], "");
    assert!(succeeds);
    assert_eq!(calls, ["token list -o json", "node list -o json"]);
    for fails in ["select(", ".token"] {
        assert!(!run(&["create", "gpu-4", "10.244.4.0/24"], fails).0, "{fails}");
        assert!(!at("out/gpu-4.yaml").exists(), "{fails}");
    }

    // Without jq it begins nothing.
    std::fs::remove_file(at("bin/jq")).unwrap();
    let _ = std::fs::remove_file(at("calls"));
    let mut command = Command::new("/bin/sh");
    command.arg(deploy("tokens/worker.sh")).args(["destroy", "gpu-1"]).arg(at("out"));
    command.env("PATH", at("bin")).env("CALLS", at("calls")).env("FAILS", "");
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("there is no jq: install it"));
    assert!(!at("calls").exists());
    parses_as_shell(&read("tokens/worker.sh"));
}

#[test]
fn the_pulumi_example_and_the_falco_rules_parse() {
    let package: Value = serde_json::from_str(&read("pulumi/package.json")).unwrap();
    assert!(package["dependencies"]["@pulumi/command"].is_string());
    assert!(yaml(&read("pulumi/Pulumi.yaml"))["runtime"] == "nodejs");
    let program = read("pulumi/index.ts");
    for command in ["create: '\"$SCRIPT\" create ", "delete: '\"$SCRIPT\" destroy "] {
        assert!(program.contains(command), "{command}");
    }
    // Another path of the script makes no other token.
    assert!(program.contains("update: \":\""));
    assert!(program.contains("triggers: [name, network, directory]"));
    let rules = yaml(&read("falco/towline_rules.yaml"));
    let rules: Vec<&Value> =
        rules.as_array().unwrap().iter().filter(|item| !item["rule"].is_null()).collect();
    assert!(!rules.is_empty());
    for rule in rules {
        for key in ["desc", "condition", "output", "priority"] {
            assert!(rule[key].is_string(), "{key} of {}", rule["rule"]);
        }
    }
}
