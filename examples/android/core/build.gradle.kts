import org.jetbrains.kotlin.gradle.dsl.JvmTarget

plugins {
    kotlin("jvm")
}

java {
    sourceCompatibility = JavaVersion.VERSION_1_8
    targetCompatibility = JavaVersion.VERSION_1_8
}

kotlin {
    compilerOptions {
        jvmTarget = JvmTarget.JVM_1_8
    }
}

dependencies {
    // The classes of onnxruntime-android, which a JVM module cannot take; the app brings those.
    compileOnly("com.microsoft.onnxruntime:onnxruntime:${property("onnxruntime")}")
    testImplementation("com.microsoft.onnxruntime:onnxruntime:${property("onnxruntime")}")
    testImplementation("junit:junit:4.13.2")
}

// gradle :core:test -Pbundle=BUNDLE -Pvectors=VECTORS.json
tasks.test {
    for (name in listOf("bundle", "vectors", "resized")) {
        providers.gradleProperty(name).orNull?.let { systemProperty("fastvlm.$name", rootDir.resolve(it)) }
    }
    testLogging.showStandardStreams = true
}
