//! Several replicas over several nodes: killed, frozen, cut off from the API server, while an anchor
//! rotates under load. No request fails.

use serde_json::Value;
use steadfast_test_rig::cluster::{ANCHORS_NAMESPACE, CONTROL_NAMESPACE, Cluster, Node};
use steadfast_test_rig::until;

use crate::application::Application;
use crate::trust::{DEADLINE, ROTATION, SHORT, active, active_anchor, answered, lives, state};

#[tokio::test]
async fn replicas_that_are_killed_frozen_or_cut_off_cost_no_request_and_no_rotation() {
    let cluster = Cluster::start(2).await;
    cluster.import("steadfast-test-app");
    // SVIDs are renewed all the time, so that whoever cannot be reached is missed.
    let several = [
        "identity.replicas=3",
        "rotation.replicas=2",
        "control.replicas=2",
        "identity.svidTtl=30s",
    ];
    cluster.install(&[&SHORT[..], &several].concat()).await;
    let application = Application::start(&cluster, "shop");
    answered(&application, 100).await;
    let (pods, anchor) = (lives(&application), active_anchor(&cluster));

    // One replica of identity sleeps, another is cut off from the API server, and issues nothing.
    let replicas = pods_of(&cluster, CONTROL_NAMESPACE, "identity");
    let (frozen, cut) = (Pod::of(&replicas[0]), Pod::of(&replicas[1]));
    frozen.signal("-STOP");
    cut.connect_to_api(&cluster, false);
    until("it says that it issues nothing", DEADLINE, || async {
        // From its node: what it would say to the machine of the API server is dropped.
        let app = steadfast_test_rig::process::binary_path("steadfast-test-app");
        let ready = format!("{} get {}:9990 /ready || true", app.display(), cut.ip);
        let said = cut.node_of(&cluster).namespaces.run(&ready);
        if said.starts_with("503") { Ok(()) } else { Err(said) }
    })
    .await;
    let seen = application.report().expect("web tells").requests;
    // For longer than an SVID lives.
    answered(&application, seen + 1_300).await;
    cut.connect_to_api(&cluster, true);
    frozen.signal("-CONT");

    // The controller that leads sleeps in the middle of a rotation, and comes back when another
    // leads; that one is killed, and so is a replica.
    cluster.steadfast(&["anchor", "rotate", "--yes", "--no-wait"]).expect("it is ordered");
    until("it is under way", ROTATION, || async {
        let state = state(&cluster)?;
        if state["rotation"].is_null() { Err(state["requested"].to_string()) } else { Ok(()) }
    })
    .await;
    let controllers = pods_of(&cluster, ANCHORS_NAMESPACE, "rotation");
    let leader = || {
        let lease = ["get", "lease", "steadfast-rotation"];
        let holder = "--output=jsonpath={.spec.holderIdentity}";
        let namespace = format!("--namespace={ANCHORS_NAMESPACE}");
        let holder = cluster.try_kubectl(&[&lease[..], &[holder, &namespace]].concat())?;
        let pod = controllers.iter().map(Pod::of).find(|pod| holder.starts_with(&pod.name));
        pod.ok_or_else(|| format!("{holder:?} is no pod"))
    };
    let first = until("somebody leads", DEADLINE, || async { leader() }).await;
    first.signal("-STOP");
    let second = until("another leads", DEADLINE, || async {
        leader().and_then(|pod| if pod.name == first.name { Err(pod.name) } else { Ok(pod) })
    })
    .await;
    first.signal("-CONT");
    second.signal("-KILL");
    Pod::of(&replicas[2]).signal("-KILL");
    let control = pods_of(&cluster, CONTROL_NAMESPACE, "control");
    Pod::of(&control[0]).signal("-KILL");
    until("it has ended", ROTATION, || async {
        let state = state(&cluster)?;
        let over = state["rotation"].is_null() && active(&state) != Some(anchor.clone());
        if over {
            Ok(())
        } else {
            Err(cluster.steadfast(&["anchor", "status"]).unwrap_or_else(|s| s))
        }
    })
    .await;
    assert_eq!(lives(&application), pods, "a pod was created or restarted");
    let seen = application.report().expect("web tells").requests;
    answered(&application, seen + 100).await;
}

fn pods_of(cluster: &Cluster, namespace: &str, component: &str) -> Vec<Value> {
    let namespace = format!("--namespace={namespace}");
    let label = format!("--selector=app.kubernetes.io/name=steadfast-{component}");
    let found = cluster.kubectl(&["get", "pods", "--output=json", &namespace, &label]);
    let found: Value = serde_json::from_str(&found).expect("JSON");
    found["items"].as_array().expect("a list").clone()
}

/// A pod of the control plane.
struct Pod {
    name: String,
    ip: String,
    node: String,
}

impl Pod {
    fn of(pod: &Value) -> Self {
        let text = |at: &str| pod.pointer(at).and_then(Value::as_str).expect("it is there");
        Self {
            name: text("/metadata/name").to_owned(),
            ip: text("/status/podIP").to_owned(),
            node: text("/spec/nodeName").to_owned(),
        }
    }

    /// Sends a signal to its process, which is known by the name of its host.
    fn signal(&self, signal: &str) {
        let host = format!("HOSTNAME={}", self.name);
        let mut sent = 0;
        for process in std::fs::read_dir("/proc").expect("/proc is there").flatten() {
            let environment = std::fs::read(process.path().join("environ")).unwrap_or_default();
            if environment.split(|byte| *byte == 0).any(|variable| variable == host.as_bytes()) {
                let pid = process.file_name();
                let kill = std::process::Command::new("kill").arg(signal).arg(&pid).status();
                // One that has ended meanwhile was none of those that stay.
                sent += usize::from(kill.is_ok_and(|kill| kill.success()));
            }
        }
        assert!(sent > 0, "no process of the pod {}", self.name);
    }

    fn node_of<'a>(&self, cluster: &'a Cluster) -> &'a Node {
        cluster.nodes().iter().find(|node| node.name() == self.node).expect("it runs there")
    }

    /// Whether its packets to the API server, and to the Service that stands for it, arrive.
    fn connect_to_api(&self, cluster: &Cluster, connected: bool) {
        let ip = &self.ip;
        self.node_of(cluster).namespaces.run(&match connected {
            true => "nft delete table ip cut".to_owned(),
            false => format!(
                "nft 'table ip cut {{ chain forward {{ type filter hook forward priority -300; \
                 ip saddr {ip} ip daddr 10.250.0.2 drop; }}; }}'"
            ),
        });
    }
}
