//! The control plane, installed by its charts.

use steadfast_test_rig::cluster::Cluster;

#[tokio::test]
async fn the_charts_install_a_control_plane_that_founds_its_own_trust_domain() {
    let cluster = Cluster::start(2).await;
    cluster.install(&[]).await;
    println!("{}", cluster.kubectl(&["get", "trustdomain", "--output=wide"]));
    println!("{}", cluster.kubectl(&["get", "pods,configmaps,secrets,leases", "--all-namespaces"]));
}
