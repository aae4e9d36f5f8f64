plugins {
    kotlin("jvm")
    application
}

dependencies {
    implementation(project(":core"))
    implementation("com.microsoft.onnxruntime:onnxruntime:${property("onnxruntime")}")
}

// gradle :desktop:run --args="BUNDLE PICTURE QUESTION"
application {
    mainClass = "fastvlm.desktop.MainKt"
}
