//! Promise 2 on Kubernetes: anchors rotate under real pods, none of which is restarted, and no
//! request fails.

use std::time::Duration;

use serde_json::Value;
use steadfast_test_rig::cluster::Cluster;
use steadfast_test_rig::until;

use crate::application::Application;

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
    cluster.api.kill();
    // Longer than the read lease: identity stops issuing, and says so.
    tokio::time::sleep(READ_LEASE * 3).await;
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

/// Waits until so many requests have been answered, and none has failed.
async fn answered(application: &Application, requests: u64) {
    let report = until("requests are answered", DEADLINE, || async {
        let report = application.report()?;
        if report.requests >= requests { Ok(report) } else { Err(format!("{report:?}")) }
    })
    .await;
    assert_eq!(report.failed, 0, "{report:?}");
}

/// What a pod is known by, and how often its containers were started.
fn lives(application: &Application) -> Vec<(String, u64)> {
    let life = |pod: &Value| {
        let statuses = ["containerStatuses", "initContainerStatuses"];
        let all = statuses.iter().filter_map(|kind| pod["status"][kind].as_array()).flatten();
        let restarts = all.filter_map(|container| container["restartCount"].as_u64()).sum();
        (pod["metadata"]["uid"].as_str().expect("a UID").to_owned(), restarts)
    };
    application.pods().iter().map(life).collect()
}

fn active_anchor(cluster: &Cluster) -> String {
    let state = state(cluster).expect("the state is there");
    active(&state).expect("an anchor is active")
}

fn active(state: &Value) -> Option<String> {
    let anchors = state["anchors"].as_array()?;
    let active = anchors.iter().find(|anchor| anchor["state"] == "Active")?;
    active["id"].as_str().map(str::to_owned)
}

fn state(cluster: &Cluster) -> Result<Value, String> {
    let found = cluster.try_kubectl(&["get", "trustdomain", "steadfast", "--output=json"])?;
    let found: Value = serde_json::from_str(&found).map_err(|error| error.to_string())?;
    Ok(found["spec"].clone())
}

/// Values by which a rotation takes a minute.
const SHORT: [&str; 2] = ["rotation.readLease=5s", "rotation.renewWindow=5s"];
const READ_LEASE: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(60);
/// With the time that kubelets take to bring a changed bundle into their pods.
const ROTATION: Duration = Duration::from_secs(300);
