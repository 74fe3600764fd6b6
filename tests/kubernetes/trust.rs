//! What the tests look at while the trust of a cluster changes.

use std::time::Duration;

use serde_json::Value;
use steadfast_test_rig::cluster::Cluster;
use steadfast_test_rig::until;

use crate::application::Application;

/// Waits until so many requests have been answered, and none has failed.
pub async fn answered(application: &Application, requests: u64) {
    let report = until("requests are answered", ROTATION, || async {
        let report = application.report()?;
        if report.requests >= requests { Ok(report) } else { Err(format!("{report:?}")) }
    })
    .await;
    assert_eq!(report.failed, 0, "{report:?}");
}

/// What a pod is known by, and how often its containers were started.
pub fn lives(application: &Application) -> Vec<(String, u64)> {
    let life = |pod: &Value| {
        let statuses = ["containerStatuses", "initContainerStatuses"];
        let all = statuses.iter().filter_map(|kind| pod["status"][kind].as_array()).flatten();
        let restarts = all.filter_map(|container| container["restartCount"].as_u64()).sum();
        (pod["metadata"]["uid"].as_str().expect("a UID").to_owned(), restarts)
    };
    application.pods().iter().map(life).collect()
}

/// The anchor that signs.
pub fn active_anchor(cluster: &Cluster) -> String {
    let state = state(cluster).expect("the state is there");
    active(&state).expect("an anchor is active")
}

/// The same in a state.
pub fn active(state: &Value) -> Option<String> {
    let anchors = state["anchors"].as_array()?;
    let active = anchors.iter().find(|anchor| anchor["state"] == "Active")?;
    active["id"].as_str().map(str::to_owned)
}

/// The state.
pub fn state(cluster: &Cluster) -> Result<Value, String> {
    let found = cluster.try_kubectl(&["get", "trustdomain", "steadfast", "--output=json"])?;
    let found: Value = serde_json::from_str(&found).map_err(|error| error.to_string())?;
    Ok(found["spec"].clone())
}

/// Values by which a rotation takes a minute.
pub const SHORT: [&str; 3] =
    ["rotation.readLease=5s", "rotation.renewWindow=5s", "rotation.emergencyRenewWindow=5s"];
pub const DEADLINE: Duration = Duration::from_secs(120);
/// With the time that kubelets take to bring a changed bundle into their pods.
pub const ROTATION: Duration = Duration::from_secs(300);
