//! Upgrades from the commit before this one, and back, under load. No request fails.

use serde_json::Value;
use steadfast_test_rig::cluster::{Cluster, PREVIOUS_TAG};

use crate::application::Application;
use crate::trust::{SHORT, active_anchor, answered, lives};

#[tokio::test]
async fn an_upgrade_from_the_previous_commit_and_back_costs_no_request() {
    let cluster = Cluster::start(2).await;
    cluster.import("steadfast-test-app");
    cluster.install_previous(&SHORT).await;
    let application = Application::start(&cluster, "shop");
    answered(&application, 100).await;
    assert_eq!(sidecars(&application), [PREVIOUS_TAG]);
    let pods = lives(&application);

    // First the control plane, which then rotates an anchor under the sidecars of before.
    cluster.upgrade(&SHORT);
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let anchor = active_anchor(&cluster);
    cluster.steadfast(&["anchor", "rotate", "--yes"]).unwrap_or_else(|error| panic!("{error}"));
    assert_ne!(active_anchor(&cluster), anchor);
    more_are_answered(&application).await;
    assert_eq!(lives(&application), pods, "a pod was created or restarted");

    // Then the sidecars, with their pods: those that are asked, while they are asked.
    application.restart(&["store", "api"]).await;
    more_are_answered(&application).await;
    assert_eq!(sidecars(&application), ["1", PREVIOUS_TAG]);
    application.restart(&["web"]).await;
    more_are_answered(&application).await;
    assert_eq!(sidecars(&application), ["1"]);
    let checked = cluster.steadfast(&["check", "--proxy", "--wait=30s"]);
    checked.unwrap_or_else(|wrong| panic!("{wrong}"));

    // And back, in the same order.
    cluster.downgrade(&SHORT);
    more_are_answered(&application).await;
    application.restart(&["store", "api"]).await;
    more_are_answered(&application).await;
    application.restart(&["web"]).await;
    more_are_answered(&application).await;
    assert_eq!(sidecars(&application), [PREVIOUS_TAG]);
}

/// Waits until so many more requests have been answered, and none has ever failed.
async fn more_are_answered(application: &Application) {
    let seen = application.report().expect("web tells").requests;
    answered(application, seen + 100).await;
}

/// The tags of the images of all sidecars.
fn sidecars(application: &Application) -> Vec<String> {
    let mut tags: Vec<_> = application.pods().iter().map(sidecar).collect();
    tags.sort();
    tags.dedup();
    tags
}

fn sidecar(pod: &Value) -> String {
    let containers = pod["spec"]["initContainers"].as_array().into_iter().flatten();
    let images = containers.filter_map(|container| container["image"].as_str());
    let tag = images.filter_map(|image| image.strip_prefix("localhost/steadfast-proxy:")).next();
    tag.unwrap_or_else(|| panic!("no sidecar: {pod:#}")).to_owned()
}
