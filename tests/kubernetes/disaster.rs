//! What one command heals: a store that was put back in the middle of a rotation, and a cluster that
//! was off until everything had expired. No pod is created anew.

use std::cell::Cell;
use std::time::Duration;

use serde_json::Value;
use steadfast_api::UnixTime;
use steadfast_process::{Clock as _, SystemClock};
use steadfast_test_rig::cluster::{ANCHORS_NAMESPACE, CONTROL_NAMESPACE, Cluster};
use steadfast_test_rig::until;

use crate::application::Application;
use crate::trust::{DEADLINE, ROTATION, SHORT, active, active_anchor, answered, lives, state};

#[tokio::test]
async fn etcd_that_is_put_back_in_the_middle_of_a_rotation_halts_and_is_recovered() {
    let mut cluster = Cluster::start(1).await;
    cluster.import("steadfast-test-app");
    cluster.install(&SHORT).await;
    let application = Application::start(&cluster, "shop");
    answered(&application, 50).await;
    let (pods, before) = (lives(&application), active_anchor(&cluster));
    cluster.steadfast(&["anchor", "rotate", "--yes", "--no-wait"]).expect("it is ordered");
    until("it is staged", ROTATION, || async {
        let phase = state(&cluster)?["rotation"]["phase"].to_string();
        if phase.contains("staged") { Ok(()) } else { Err(phase) }
    })
    .await;
    let snapshot = cluster.dir().join("snapshot.db");
    cluster.snapshot(&snapshot);
    let after = idle_under_another(&cluster, &before).await;

    cluster.restore(&snapshot).await;
    until("the state is halted", DEADLINE, || async {
        let state = state(&cluster)?;
        if state["halted"].is_null() { Err(state["rotation"].to_string()) } else { Ok(()) }
    })
    .await;
    let shown = until("kubectl shows it", DEADLINE, || async {
        let shown = cluster.try_kubectl(&["get", "trustdomain"])?;
        if shown.contains("Halted") { Ok(shown) } else { Err(shown) }
    })
    .await;
    println!("{shown}");
    let check = cluster.steadfast(&["check"]).unwrap_err();
    assert!(check.contains("steadfast trust recover"), "{check}");

    let recovered = cluster.steadfast(&["trust", "recover", "--yes"]);
    println!("{}", recovered.unwrap_or_else(|error| panic!("{error}")));
    let healed = until("it is idle", ROTATION, || async {
        let state = state(&cluster)?;
        let idle = state["halted"].is_null() && state["rotation"].is_null();
        if idle { Ok(state) } else { Err(state["rotation"].to_string()) }
    })
    .await;
    let published = |id: &str| {
        let anchors = healed["anchors"].as_array().expect("a list");
        anchors.iter().any(|anchor| anchor["id"] == id && anchor["state"] != "Withdrawn")
    };
    assert!(!published(&before), "what was withdrawn is back: {healed:#}");
    assert!(published(&after), "what everybody had is gone: {healed:#}");
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = application.report().expect("web tells").requests;
    answered(&application, seen + 100).await;
}

#[tokio::test]
async fn a_cluster_that_slept_until_everything_had_expired_is_healed_by_one_command() {
    let cluster = Cluster::start(1).await;
    cluster.import("steadfast-test-app");
    cluster.install(&BRIEF).await;
    let application = Application::start(&cluster, "shop");
    answered(&application, 20).await;
    let pods = lives(&application);
    let ends = || {
        let state = state(&cluster).expect("the state is there");
        let anchors = state["anchors"].as_array().expect("a list").clone();
        let last = anchors.iter().filter_map(|anchor| anchor["not_after"].as_u64()).max();
        UnixTime::from_millis(last.expect("there are anchors"))
    };
    let ends = ends();
    cluster.sleep();
    until("everything has expired", BRIEF_ANCHORS, || async {
        let now = SystemClock.now();
        if now > ends { Ok(()) } else { Err(format!("{:?} are left", ends.since(now))) }
    })
    .await;
    cluster.wake();
    // As after a power cut: the control plane begins with what is stored alone.
    let all = ["delete", "pods", "--all", "--grace-period=1", "--wait=false", "--namespace"];
    until("the control plane is started again", DEADLINE, || async {
        for namespace in [CONTROL_NAMESPACE, ANCHORS_NAMESPACE] {
            cluster.try_kubectl(&[&all[..], &[namespace]].concat())?;
        }
        Ok::<_, String>(())
    })
    .await;
    until("nothing is issued any more", DEADLINE, || async {
        let asked = cluster.try_kubectl(&["get", "trustdomain"])?;
        let check = cluster.steadfast(&["trust", "status"]).unwrap_or_else(|said| said);
        if check.contains("trust recover") { Ok(()) } else { Err(format!("{asked}\n{check}")) }
    })
    .await;

    let recovered = cluster.steadfast(&["trust", "recover", "--yes"]);
    println!("{}", recovered.unwrap_or_else(|error| panic!("{error}")));
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    // What was sent while nobody could answer has failed; nothing that is sent from now on does.
    let counts = || application.report().map(|report| (report.failed, report.requests));
    let healed = Cell::new(counts().expect("web tells"));
    until("requests are answered again", DEADLINE, || async {
        let ((failed, requests), before) = (counts()?, healed.get());
        if failed != before.0 {
            healed.set((failed, requests));
        }
        let well = failed == before.0 && requests > before.1 + 100;
        if well { Ok(()) } else { Err(format!("{before:?}, now {failed} of {requests}")) }
    })
    .await;
}

/// The anchor that is active once the rotation has ended.
async fn idle_under_another(cluster: &Cluster, before: &str) -> String {
    until("the rotation has ended", ROTATION, || async {
        let state: Value = state(cluster)?;
        match active(&state) {
            Some(active) if state["rotation"].is_null() && active != before => Ok(active),
            _ => Err(state["rotation"].to_string()),
        }
    })
    .await
}

/// As long as those anchors live, and some.
const BRIEF_ANCHORS: Duration = Duration::from_secs(240);
const BRIEF: [&str; 7] = [
    "rotation.readLease=3s",
    "rotation.renewWindow=2s",
    "rotation.anchorLifetime=210s",
    "rotation.anchorPeriod=100s",
    "rotation.issuerLifetime=120s",
    "rotation.issuerLeft=40s",
    "identity.svidTtl=20s",
];
