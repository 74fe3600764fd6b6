//! Promise 2 on Kubernetes: anchors rotate under real pods, none of which is restarted, and no
//! request fails.

use serde_json::Value;
use steadfast_test_rig::cluster::{ANCHORS_NAMESPACE, CONTROL_NAMESPACE, Cluster};
use steadfast_test_rig::process::binary_path;
use steadfast_test_rig::until;

use crate::application::Application;
use crate::trust::{DEADLINE, ROTATION, SHORT, active, active_anchor, answered, lives, state};

#[tokio::test]
async fn an_anchor_rotates_under_real_pods_and_no_request_fails() {
    let cluster = Cluster::start(2).await;
    cluster.import("steadfast-test-app");
    cluster.install(&SHORT).await;
    let application = Application::start(&cluster, "shop");
    answered(&application, 100).await;
    let (pods, anchor) = (lives(&application), active_anchor(&cluster));

    let said = cluster.steadfast(&["anchor", "rotate", "--yes"]).unwrap_or_else(|e| panic!("{e}"));
    println!("{said}");
    assert_ne!(active_anchor(&cluster), anchor, "{said}");
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = application.report().expect("web tells").requests;
    answered(&application, seen + 100).await;
    for pod in application.pods() {
        let name = format!("shop/{}", pod["metadata"]["name"].as_str().expect("a name"));
        let identity = cluster.steadfast(&["identity", &name, "--output=json"]);
        let identity = identity.unwrap_or_else(|error| panic!("{name}: {error}"));
        let identity: Value = serde_json::from_str(&identity).expect("JSON");
        assert_eq!(identity["anchor"].as_str(), Some(&*active_anchor(&cluster)), "{identity:#}");
    }
}

/// Canaries first; turned back after the activation; with the anchor's key, and the issuer's, in other
/// hands; with the anchor's key deleted by mistake, and then the issuer's.
#[tokio::test]
async fn every_kind_of_rotation_ends_under_real_pods_and_no_request_fails() {
    let cluster = Cluster::start(1).await;
    cluster.import("steadfast-test-app");
    cluster.install(&SHORT).await;
    let application = Application::start(&cluster, "shop");
    answered(&application, 100).await;
    let pods = lives(&application);
    let run = |args: &[&str]| cluster.steadfast(args).unwrap_or_else(|e| panic!("{args:?}: {e}"));

    let first = active_anchor(&cluster);
    let canary = ["--canary=shop", "--canary-for=10s"];
    println!("{}", run(&[&["anchor", "rotate", "--yes"], &canary[..]].concat()));
    let second = active_anchor(&cluster);
    assert_ne!(second, first);

    run(&["anchor", "rotate", "--yes", "--no-wait"]);
    until("another is active", ROTATION, || async {
        let now = active_anchor(&cluster);
        if now == second { Err(now) } else { Ok(()) }
    })
    .await;
    println!("{}", run(&["anchor", "abort", "--yes"]));
    until("it has turned back", ROTATION, || async {
        let state = state(&cluster)?;
        let back = state["rotation"].is_null() && active(&state).as_ref() == Some(&second);
        if back { Ok(()) } else { Err(state["rotation"].to_string()) }
    })
    .await;

    println!("{}", run(&["anchor", "rotate", "--emergency", "--yes"]));
    assert_ne!(active_anchor(&cluster), second);
    let issuer = || state(&cluster).expect("the state")["active_issuer"].clone();
    let stolen = issuer();
    println!("{}", run(&["issuer", "rotate", "--emergency", "--yes"]));
    assert_ne!(issuer(), stolen);
    let denied = state(&cluster).expect("the state")["denied_issuers"].to_string();
    assert!(denied.contains(stolen.as_str().expect("an id")), "{denied}");

    let lost = active_anchor(&cluster);
    let key = format!("steadfast-anchor-{lost}");
    cluster.kubectl(&["delete", "secret", &key, &format!("--namespace={ANCHORS_NAMESPACE}")]);
    until("the standby has taken its place", ROTATION, || async {
        let state = state(&cluster)?;
        let mended = state["rotation"].is_null() && active(&state).as_ref() != Some(&lost);
        if mended { Ok(()) } else { Err(state["rotation"].to_string()) }
    })
    .await;

    // The issuer's too, and nobody has it in memory any more.
    let lost = issuer();
    let key = format!("steadfast-issuer-{}", lost.as_str().expect("an id"));
    let namespace = format!("--namespace={CONTROL_NAMESPACE}");
    let replicas = |count: &str| {
        let identity = ["scale", "deployment/steadfast-identity", &namespace];
        cluster.kubectl(&[&identity[..], &[&format!("--replicas={count}")]].concat());
    };
    replicas("0");
    let pods_of_it = "--selector=app.kubernetes.io/name=steadfast-identity";
    cluster.kubectl(&["wait", "--for=delete", "pods", pods_of_it, &namespace, "--timeout=110s"]);
    cluster.kubectl(&["delete", "secret", &key, &namespace]);
    replicas("1");
    until("another issuer has taken its place", ROTATION, || async {
        let state = state(&cluster)?;
        let mended = state["issuer_rotation"].is_null() && state["active_issuer"] != lost;
        if mended { Ok(()) } else { Err(state["issuer_rotation"].to_string()) }
    })
    .await;

    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = application.report().expect("web tells").requests;
    answered(&application, seen + 100).await;
}

#[tokio::test]
async fn a_rotation_outlives_an_api_server_that_is_killed_and_comes_back() {
    let mut cluster = Cluster::start(1).await;
    cluster.import("steadfast-test-app");
    cluster.install(&SHORT).await;
    let application = Application::start(&cluster, "shop");
    answered(&application, 100).await;
    let (pods, anchor) = (lives(&application), active_anchor(&cluster));
    cluster.steadfast(&["anchor", "rotate", "--yes", "--no-wait"]).expect("it is ordered");
    until("it is under way", ROTATION, || async {
        let state = state(&cluster)?;
        let phase = state["rotation"]["phase"].to_string();
        if phase.contains("activated") || phase.contains("draining") { Ok(()) } else { Err(phase) }
    })
    .await;
    let identity = ["get", "pods", "--namespace=steadfast", "--output=json", "--selector"];
    let identity = [&identity[..], &["app.kubernetes.io/name=steadfast-identity"]].concat();
    let identity: Value = serde_json::from_str(&cluster.kubectl(&identity)).expect("JSON");
    let ip = identity["items"][0]["status"]["podIP"].as_str().expect("an address");
    cluster.api.kill();
    // For longer than the read lease: until identity issues nothing any more, and says so.
    let app = binary_path("steadfast-test-app").display().to_string();
    until("identity issues nothing", DEADLINE, || async {
        let said = cluster.control().run(&format!("{app} get {ip}:9990 /ready"));
        if said.starts_with("503") { Ok(()) } else { Err(said) }
    })
    .await;
    cluster.api.restart();
    until("it has ended", ROTATION, || async {
        let state = state(&cluster)?;
        let active = active(&state);
        let over = state["rotation"].is_null() && active != Some(anchor.clone());
        if over { Ok(()) } else { Err(state["rotation"].to_string()) }
    })
    .await;
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = until("web tells", DEADLINE, || async { application.report() }).await.requests;
    answered(&application, seen + 100).await;
}

#[tokio::test]
async fn a_node_that_is_cut_off_is_waited_for_and_a_pod_that_sleeps_is_exempted_and_heals() {
    let cluster = Cluster::start(2).await;
    cluster.import("steadfast-test-app");
    // What is not to be cut off is where DNS is.
    let dns = ["get", "pods", "--namespace=kube-system", "--output=json"];
    let dns: Value = serde_json::from_str(&cluster.kubectl(&dns)).expect("JSON");
    let near = dns["items"][0]["spec"]["nodeName"].as_str().expect("it runs somewhere").to_owned();
    let far = cluster.nodes().iter().position(|node| node.name() != near).expect("another");
    let there = format!("nodeSelector.kubernetes\\.io/hostname={near}");
    cluster.install(&[&SHORT[..], &[&*there]].concat()).await;
    let application = Application::start_on(&cluster, "shop", &near);
    for (name, node) in [("sleeper", near.as_str()), ("far", cluster.nodes()[far].name())] {
        cluster.apply(&meshed_by_hand(&cluster, name, node));
        let pod = format!("pod/{name}");
        cluster.wait_for(&["--for=condition=Ready", &pod, "--namespace=shop"]).await;
    }
    answered(&application, 100).await;
    let (pods, anchor) = (lives(&application), active_anchor(&cluster));

    signal("sleeper", "-STOP");
    cluster.connect(far, false);
    cluster.steadfast(&["anchor", "rotate", "--yes", "--no-wait"]).expect("it is ordered");
    let waits_for = |names: &'static [&'static str], not: &'static [&'static str]| {
        let cluster = &cluster;
        until("it waits for these", ROTATION, move || async move {
            // Also while somebody is in the way, which its exit code says.
            let said = cluster.steadfast(&["anchor", "status"]).unwrap_or_else(|said| said);
            let all = names.iter().all(|name| said.contains(name));
            if all && !not.iter().any(|name| said.contains(name)) { Ok(()) } else { Err(said) }
        })
    };
    waits_for(&["shop/sleeper", "shop/far"], &[]).await;
    cluster.connect(far, true);
    waits_for(&["shop/sleeper"], &["shop/far"]).await;
    let reason = "--reason=asleep";
    cluster.steadfast(&["anchor", "exempt", "shop/sleeper", reason, "--yes"]).expect("exempted");
    let state = until("it has ended", ROTATION, || async {
        let state = state(&cluster)?;
        let over = state["rotation"].is_null() && active(&state) != Some(anchor.clone());
        if over { Ok(state) } else { Err(state["rotation"].to_string()) }
    })
    .await;

    signal("sleeper", "-CONT");
    let healed = active(&state);
    for name in ["shop/sleeper", "shop/far"] {
        until("it has an SVID under the new anchor", DEADLINE, || async {
            let identity = cluster.steadfast(&["identity", name, "--output=json"])?;
            let identity: Value = serde_json::from_str(&identity).map_err(|e| e.to_string())?;
            let anchor = identity["anchor"].as_str().map(str::to_owned);
            if anchor == healed { Ok(()) } else { Err(identity.to_string()) }
        })
        .await;
    }
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = application.report().expect("web tells").requests;
    answered(&application, seen + 100).await;
}

/// A pod that was meshed by `steadfast inject --manual`, with no probe that would start it anew.
fn meshed_by_hand(cluster: &Cluster, name: &str, node: &str) -> String {
    let pod = serde_json::json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop" },
        "spec": {
            "nodeSelector": { "kubernetes.io/hostname": node },
            "terminationGracePeriodSeconds": 0,
            "containers": [{
                "name": "app", "image": "localhost/busybox:1", "imagePullPolicy": "Never",
                "command": ["sleep", "infinity"],
            }],
        },
    });
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), pod.to_string()).expect("it is written");
    let file = file.path().display().to_string();
    let meshed = cluster.steadfast(&["inject", "--manual", &file]).expect("it is meshed");
    let mut meshed: Value =
        serde_saphyr::from_str(meshed.trim_start_matches("---\n")).expect("YAML");
    for container in meshed["spec"]["initContainers"].as_array_mut().expect("init containers") {
        container.as_object_mut().expect("a map").remove("livenessProbe");
    }
    meshed.to_string()
}

/// Sends a signal to the sidecar of a pod, by the variable that tells it the pod's name.
fn signal(pod: &str, signal: &str) {
    let told = format!("_pod_name={pod}");
    let mut sent = 0;
    for process in std::fs::read_dir("/proc").expect("/proc is there").flatten() {
        let environment = std::fs::read(process.path().join("environ")).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|variable| variable == told.as_bytes()) {
            let pid = process.file_name();
            let kill = std::process::Command::new("kill").arg(signal).arg(&pid).status();
            // One that has ended meanwhile was none of those that stay.
            sent += usize::from(kill.is_ok_and(|kill| kill.success()));
        }
    }
    assert!(sent > 0, "no process of the pod {pod}");
}
